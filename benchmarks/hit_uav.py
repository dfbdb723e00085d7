"""Does distillation help a student that sees HIT-UAV at half of the sensor's resolution?

Trains the teacher once, caches what it sees, then trains each method once per seed, in rounds: all with seed 0, then
all with seed 1, ... Every finished row is stored at once; the same command goes on behind it.

    python -m benchmarks.hit_uav --size cpu
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.hit_uav_presets import Preset, doubled, presets
from benchmarks.paired import table
from benchmarks.plain_run import Run, evaluate, train
from benchmarks.plain_setup import Setup, Teaching, keep_freed_memory
from benchmarks.plain_teaching import fill_cache
from benchmarks.store import Store, fingerprint
from data_sharding.datasets import coco
from kd import student as student_files

ROOT = Path(__file__).parent.parent
PLAIN, EQUAL_TIME = "plain", "plain_equal_time"
COLUMNS = ("AP", "AP_small", "AP50", "cpu_seconds")


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    began = time.perf_counter()
    preset = presets(str(options.weights))[options.size]
    path = options.results or ROOT / "benchmarks" / "results" / f"hit_uav_{options.size}.json"
    names = presets("weights")[options.size]  # settings without paths
    store = Store(path, fingerprint(replace(names, methods={})))
    if options.show:
        show(store)
        return
    setup = setup_of(preset, options)
    ensure_teacher(setup, preset, store)
    for method, seed in rounds(preset, options.seeds):
        told = fingerprint(names.methods.get(method))
        if (done := store.row(method, seed)) is not None:
            if done["settings"] != told:
                raise ValueError(f"{path.name}: {method}, seed {seed} was made with other settings; take that row out")
            continue
        if options.minutes is not None and not _fits(
            store, method, options.minutes - (time.perf_counter() - began) / 60
        ):
            print(f"stopped before {method}, seed {seed}: no time left for it; the same command goes on with it")
            break
        row = row_of(train(of_row(setup, preset, store, method, seed)), method, seed)
        store.add(row | {"settings": told})
        print(as_line(row), flush=True)
    show(store)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument(
        "--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth", help="ImageNet MobileNetV2"
    )
    parser.add_argument("--storage", type=Path, help="packed images, teacher and cache; default runs/hit_uav_<size>")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/hit_uav_<size>.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of torch on the processor")
    parser.add_argument("--show", action="store_true", help="print the stored rows and train nothing")
    parser.add_argument("--minutes", type=float, help="begin no row that would end later than this")
    return parser.parse_args()


def setup_of(preset: Preset, options: argparse.Namespace) -> Setup:
    """The plain student; `options`: data, storage, size."""

    def split(name: str) -> coco.Split:
        folder = options.data
        return coco.Split(images=folder / "normal_json" / name, annotations=folder / "coco" / f"instances_{name}.json")

    return Setup(
        data=coco.Config(train=split("train"), val=split("val"), ignore_categories=("DontCare",)),
        storage=options.storage or ROOT / "runs" / f"hit_uav_{options.size}",
        views=preset.views,
        evaluation_views=preset.evaluation,
        detector=preset.student,
        optim=preset.student_optim,
        device=preset.device,
    )


def ensure_teacher(setup: Setup, preset: Preset, store: Store) -> None:
    """Train the teacher where its folder is not there yet; its row in the results."""
    folder = teacher_folder(setup)
    if not (folder / student_files.FACTS).exists():
        print("training the teacher", flush=True)
        views = doubled(preset.views), doubled(preset.evaluation)
        run = train(
            replace(
                setup, detector=preset.teacher, optim=preset.teacher_optim, views=views[0], evaluation_views=views[1]
            )
        )
        at_student = evaluate(run.detector, setup)
        facts = {"AP_at_student_resolution": at_student["AP"], "seconds": run.seconds, "cpu_seconds": run.cpu_seconds}
        categories = coco.categories(setup.data)
        student_files.save(run.detector, preset.teacher, categories, folder, metrics=run.metrics | facts)
    detector, info = student_files.load(folder)
    content = store.read()
    if content["teacher"] is None:
        told = {name: round(info.metrics[name], 3) for name in (*COLUMNS, "AP_at_student_resolution")}
        parameters = sum(p.numel() for p in detector.parameters())
        store.write(content | {"teacher": {"sha256": info.sha256, "parameters": parameters, **told}})
    elif content["teacher"]["sha256"] != info.sha256:
        raise ValueError(
            f"{store.path.name} holds rows of another teacher than {folder.name}'s; rename or delete it to begin anew"
        )


def teacher_folder(setup: Setup) -> Path:
    """Where the teacher is kept."""
    return setup.storage / "teacher"


def rounds(preset: Preset, seeds: int) -> Iterator[tuple[str, int]]:
    """(method, seed), seed by seed: whenever it is stopped, the pairs are complete but for the last round."""
    return ((method, seed) for seed in range(seeds) for method in (PLAIN, *preset.methods, EQUAL_TIME))


def of_row(setup: Setup, preset: Preset, store: Store, method: str, seed: int) -> Setup:
    """The settings of one row."""
    if method in preset.methods:
        teaching = Teaching(folder=teacher_folder(setup), factor=2, align="shift")
        taught = replace(setup, seed=seed, methods=preset.methods[method], teaching=teaching)
        fill_cache(taught)
        return taught
    if method == PLAIN:
        return replace(setup, seed=seed)
    rows = {row["method"]: row for row in store.read()["rows"] if row["seed"] == seed}
    longer = rows["scalekd"][preset.clock] / rows[PLAIN][preset.clock]
    return replace(setup, seed=seed, optim=replace(setup.optim, steps=max(1, round(setup.optim.steps * longer))))


def row_of(run: Run, method: str, seed: int) -> dict[str, Any]:
    """What is stored of a run."""
    numbers = {name: round(value, 3) for name, value in run.metrics.items()}
    return {
        "method": method,
        "seed": seed,
        **numbers,
        "steps": len(run.history),
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "shares": {name: round(value, 4) for name, value in run.shares().items()},
    }


def _fits(store: Store, method: str, minutes_left: float) -> bool:
    """Whether a row, as long as the longest of its kind or of all so far, ends in time."""
    rows = store.read()["rows"]
    same = [row["seconds"] for row in rows if row["method"] == method] or [row["seconds"] for row in rows]
    return minutes_left > 1.2 * max(same, default=0.0) / 60


def as_line(row: dict[str, Any]) -> str:
    """A row as a line."""
    shares = ", ".join(f"{name} {value:.1%}" for name, value in row["shares"].items())
    return (
        f"{row['method']:17} seed {row['seed']}  AP {row['AP']:5.2f}  AP_small {row['AP_small']:5.2f}  "
        f"{row['steps']} steps in {row['cpu_seconds']:.0f} s of processor time  {shares}"
    )


def show(store: Store) -> None:
    """Print the table of what is stored."""
    content = store.read()
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in content["rows"]:
        scores.setdefault(row["method"], {})[row["seed"]] = row
    teacher = content["teacher"]
    print(
        f"\nteacher: AP {teacher['AP']:.2f} at twice the student's resolution, "
        f"{teacher['AP_at_student_resolution']:.2f} at the student's; {teacher['parameters'] / 1e6:.1f} M parameters\n"
    )
    print(table(scores, PLAIN, COLUMNS))


if __name__ == "__main__":
    main()
