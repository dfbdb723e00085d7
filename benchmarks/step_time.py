"""What a training step costs with a teacher: in memory, read from a cache, or live, against the student alone.

All are timed in turn, round after round, on the same images, so that whatever else the machine does meets all of them.
Every round is stored at once; the same command goes on behind it, or begins anew once all rounds are there.

    python -m benchmarks.step_time --size demo --rounds 15
"""

import argparse
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.plain_setup import Setup, Split, Teaching, build_detector, open_split
from benchmarks.step_modes import Contestant, Mode
from data_sharding.datasets import digits
from data_sharding.files import write_atomically
from data_sharding.views import ViewConfig
from kd import student as student_files
from kd.backbones import mobilenetv2, resnet
from kd.detectors import fcos
from kd.methods import fitnet, pkd, scalekd
from kd.optimise import OptimConfig

ROOT = Path(__file__).parent.parent
SCALEKD = scalekd.Config(start=0.0, freeze=0.0)
"""As published, with every part at work from the first step on."""
MASKED = fitnet.Config(foreground=True)
"""What a sparse cache suffices for."""
MODES: Mapping[str, Mode] = {
    "student alone": Mode(source="none"),
    "scalekd, taps in memory": Mode(source="memory", methods={"scalekd": SCALEKD}, parts=True),
    "scalekd, cached": Mode(source="cache", methods={"scalekd": SCALEKD}),
    "scalekd, cached, first read": Mode(source="first read", methods={"scalekd": SCALEKD}),
    "scalekd, cached int8": Mode(source="cache", methods={"scalekd": SCALEKD}, codec="int8"),
    "scalekd, live": Mode(source="live", methods={"scalekd": SCALEKD}),
    "scalekd, features only": Mode(source="memory", methods={"scalekd": replace(SCALEKD, beta=0.0, gamma=0.0)}),
    "scalekd, advice not refreshed": Mode(
        source="memory", methods={"scalekd": replace(SCALEKD, csa=replace(SCALEKD.csa, refresh=False))}
    ),
    "fitnet, cached": Mode(source="cache", methods={"fitnet": fitnet.Config()}),
    "pkd, cached": Mode(source="cache", methods={"pkd": pkd.Config()}),
    "foreground, taps in memory": Mode(source="memory", methods={"fitnet": MASKED}),
    "foreground, cached": Mode(source="cache", methods={"fitnet": MASKED}),
    "foreground, cached int8": Mode(source="cache", methods={"fitnet": MASKED}, codec="int8"),
    "foreground, cached sparse": Mode(source="cache", methods={"fitnet": MASKED}, codec="sparse"),
}
A, B, C, D = "student alone", "scalekd, taps in memory", "scalekd, cached", "scalekd, live"
E = "foreground, taps in memory"
RATIOS = (
    ("method:       b / a", B, A),
    ("cache:        c / b", C, B),
    ("  int8            ", "scalekd, cached int8", B),
    ("  first read      ", "scalekd, cached, first read", B),
    ("all:          c / a", C, A),
    ("live:         d / c", D, C),
    ("live:         d / a", D, A),
    ("fitnet cached / a  ", "fitnet, cached", A),
    ("pkd cached    / a  ", "pkd, cached", A),
    ("foreground: cache / memory", "foreground, cached", E),
    ("  int8            ", "foreground, cached int8", E),
    ("  sparse          ", "foreground, cached sparse", E),
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A student, a teacher at twice its pixels (time does not depend on their weights), and images for both."""

    data: digits.Config
    views: ViewConfig
    student: fcos.Config
    teacher: fcos.Config
    codec: str
    batch: int
    steps: int
    """Timed per mode and round."""


SMALL = fcos.Config(backbone=mobilenetv2.Config(width_mult=0.5, norm="batch"), width=64, head_depth=2, levels=(2, 3, 4))
PRESETS: Mapping[str, Preset] = {
    # The pair of `make demo`: 128 x 128 taught at 256 x 256.
    "demo": Preset(
        data=digits.Config(objects=(16, 32), train=64, val=1, test=1),
        views=ViewConfig(count=1, short_side=(128,), flip=0.0, buckets=((128, 128),)),
        student=SMALL,
        teacher=replace(SMALL, levels=(3, 4, 5)),
        codec="fp32",
        batch=16,
        steps=2,
    ),
    # An edge student at 640 x 640, a ResNet-50 with a wide pyramid at 1280 x 1280.
    "640": Preset(
        data=digits.Config(train=12, val=1, test=1, image_size=640),
        views=ViewConfig(count=1, short_side=None, flip=0.0, buckets=((640, 640),)),
        student=fcos.Config(backbone=mobilenetv2.Config(norm="group"), width=96, head_depth=2),
        teacher=fcos.Config(backbone=resnet.Config(depth=50, norm="group"), width=256),
        codec="fp16",
        batch=2,
        steps=1,
    ),
}


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    preset = replace(PRESETS[options.size], **({} if options.batch is None else {"batch": options.batch}))
    path = options.results or ROOT / "benchmarks" / "results" / f"step_time_{options.size}.json"
    if options.show:
        print("\n".join(report(json.loads(path.read_text()))))
        return
    content = _begun(path, preset, options)
    split, setup = prepare(preset, options)
    contestants = {name: Contestant(setup, mode, split) for name, mode in MODES.items()}
    for contestant in contestants.values():
        contestant.round(0, 1)  # the first steps of a process find no memory and no compiled kernel
    for number in range(len(content["rounds"]), options.rounds):
        content["rounds"].append(one_round(contestants, number, preset.steps))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        print(f"round {number + 1} of {options.rounds}", flush=True)
    print("\n".join(report(content)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the processor; the loader has one more")
    parser.add_argument("--batch", type=int, help="images per step instead of the size's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "step_time", help="packed images and caches")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/step_time_<size>.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def prepare(preset: Preset, options: argparse.Namespace) -> tuple[Split, Setup]:
    """Pack the images and keep a teacher with random weights, where that is not done yet."""
    setup = Setup(
        data=preset.data,
        storage=options.storage,
        views=preset.views,
        evaluation_views=preset.views,
        detector=preset.student,
        optim=OptimConfig(optimizer="adamw", lr=1e-4, batch=preset.batch, clip_norm=10.0),
        teaching=Teaching(folder=options.storage / f"teacher_{options.size}", codec=preset.codec),
        device=options.device,
    )
    assert setup.teaching is not None
    split = open_split(setup, "train", setup.views)
    if not (setup.teaching.folder / student_files.FACTS).exists():
        teacher = build_detector(replace(setup, detector=preset.teacher, device="cpu"), split.dataset.categories)
        student_files.save(teacher, preset.teacher, split.dataset.categories, setup.teaching.folder)
    return split, setup


def one_round(contestants: Mapping[str, Contestant], number: int, steps: int) -> dict[str, Any]:
    """Every mode once, on the same images, each time in another order."""
    turns = random.Random(number).sample(list(contestants), len(contestants))
    found = {name: asdict(contestants[name].round(number * (steps + 1), steps)) for name in turns}
    return {"load": round(os.getloadavg()[0], 2), "modes": {name: _rounded(found[name]) for name in contestants}}


def _rounded(timing: dict[str, Any]) -> dict[str, Any]:
    return {k: _rounded(v) if isinstance(v, dict) else round(v, 6) for k, v in timing.items()}


def _begun(path: Path, preset: Preset, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds so far where they were made with these settings and are not complete; else none."""
    settings = {
        "size": options.size,
        "preset": hashlib.sha256(repr((preset, MODES)).encode()).hexdigest()[:12],
        "batch": preset.batch,
        "threads": options.threads,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
        "torch": str(torch.__version__),
    }
    found = json.loads(path.read_text()) if path.exists() else {}
    goes_on = found.get("settings") == settings and len(found["rounds"]) < options.rounds
    return found if goes_on else {"settings": settings, "rounds": []}


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The tables of what is stored: medians over rounds, and the smallest and largest."""
    rounds = content["rounds"]
    loads = [entry["load"] for entry in rounds]
    yield f"\n{content['settings']}\n{len(rounds)} rounds, load of the machine {min(loads)} .. {max(loads)}\n"
    yield f"{'ms per step':36} {'wall':>24}   {'processor':>24}   waited for data"
    for name in MODES:
        columns = [[1000 * entry["modes"][name][kind] for entry in rounds] for kind in ("wall", "cpu")]
        waited = median(1000 * entry["modes"][name]["waited"] for entry in rounds)
        yield f"{name:36} {_spread(columns[0], 1)}   {_spread(columns[1], 1)}   {waited:8.1f}"
    yield f"\n{'ratios of the same round':36} {'wall':>24}   {'processor':>24}   fastest/fastest"
    kind = "cpu" if content["settings"]["device"] == "cpu" else "wall"
    for title, over, under in RATIOS:
        ratios = [[_of(e, over, k) / _of(e, under, k) for e in rounds] for k in ("wall", "cpu")]
        # Other programs only ever add time, so that the fastest rounds come closest to a machine of one's own.
        best = min(_of(e, over, kind) for e in rounds) / min(_of(e, under, kind) for e in rounds)
        yield f"{title:36} {_spread(ratios[0], 3)}   {_spread(ratios[1], 3)}   {best:8.3f}"
    yield f"\n{'parts of b / a':36} {'share of a, wall':>24}"
    for title, shares in parts(rounds).items():
        yield f"{title:36} {_spread(shares, 3)}"


def _of(entry: Mapping[str, Any], mode: str, kind: str) -> float:
    return entry["modes"][mode][kind]


def parts(rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """What ScaleKD adds to the student's step, part by part, in steps of the student alone, per round.

    The backward of features and responses runs inside the student's: it is the student's section of b less that of a.
    """

    def of(entry: Mapping[str, Any], mode: str, name: str) -> float:
        return entry["modes"][mode]["parts"].get(name, 0.0)

    timed: set[str] = {name for entry in rounds for name in entry["modes"][B]["parts"]}
    titles: dict[str, str] = {"assistant": "assistant: head and loss", "teacher": "teacher: taps to float32"}
    found = {
        titles.get(name, name): [of(entry, B, name) / entry["modes"][A]["wall"] for entry in rounds]
        for name in sorted(timed - {"student", "optimizer"})
    }
    for name, title in (("student", "features and responses: backward"), ("optimizer", "optimizer: more parameters")):
        found[title] = [(of(entry, B, name) - of(entry, A, name)) / entry["modes"][A]["wall"] for entry in rounds]
    for title, less in (
        ("whole feature loss (by its absence)", "scalekd, features only"),
        ("refresh (by its absence)", "scalekd, advice not refreshed"),
    ):
        base = A if less.endswith("only") else less
        more = less if less.endswith("only") else B
        found[title] = [
            (entry["modes"][more]["wall"] - entry["modes"][base]["wall"]) / entry["modes"][A]["wall"]
            for entry in rounds
        ]
    return found


def _spread(values: Sequence[float], digits: int) -> str:
    told = f"{min(values):.{digits}f} .. {max(values):.{digits}f}"
    return f"{median(values):8.{digits}f} {told:>15}"


if __name__ == "__main__":
    main()
