"""What a sweep of 1, 4 or 16 students costs with a teacher cache, its building included, and with a live teacher.

Measured on the two-core HIT-UAV recipe: the whole cache is built anew (as the actors of `cluster.cache_teacher` build
it), then steps with the live teacher, with the cache and without any teacher take turns, round after round. The rest is
multiplication: evaluation and start-up are the same on both sides and are not in it. Times do not depend on what the
teacher has learnt, so that one with random weights serves where the recipe's has not been trained.

    python -m benchmarks.sweep_cost
"""

import argparse
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.hit_uav_presets import Preset, presets
from benchmarks.plain_setup import Setup, Split, Teaching, build_detector, keep_freed_memory, open_split
from benchmarks.plain_teaching import fill_cache
from benchmarks.step_modes import Contestant, Mode
from cluster import build
from cluster.precompute.ahead import AheadOfWriting, give_way
from cluster.precompute.batches import Assembled
from data_sharding.cache.writer import CacheWriter
from data_sharding.datasets import coco
from data_sharding.files import write_atomically
from kd import student as student_files
from kd.teacher import LiveTeacher

ROOT = Path(__file__).parent.parent
STUDENTS = (1, 4, 16)


def main() -> None:
    """The command line."""
    options = _options()
    if options.show:
        report(json.loads(options.results.read_text()))
        return
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    preset = presets(str(options.weights))["cpu"]
    setup, split = prepare(preset, options)
    shutil.rmtree(setup.storage / "caches", ignore_errors=True)
    print("building the cache", flush=True)
    seconds = fill_cache(setup, ahead)
    written = sum(path.stat().st_size for path in (setup.storage / "caches").rglob("*") if path.is_file())
    content = {
        "method": options.method, "codec": options.codec, "threads": options.threads, "cores": os.cpu_count(),
        "images": len(split.dataset), "views": split.views.count, "batch": setup.optim.batch,
        "steps": setup.optim.steps, "build": seconds, "bytes": written,
        "rounds": timed(setup, split, preset.methods[options.method], options),
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    report(content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument(
        "--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth", help="ImageNet MobileNetV2"
    )
    parser.add_argument("--method", default="scalekd", help="of the recipe's")
    parser.add_argument("--codec", default="int8_channel")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="timed per kind and round")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the processor")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="whose images are stored")
    parser.add_argument(
        "--storage", type=Path, default=ROOT / "runs" / "sweep_cost", help="packed images and the cache"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "sweep_cost.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def prepare(preset: Preset, options: argparse.Namespace) -> tuple[Setup, Split]:
    """The recipe, with the images packed and a teacher of its make."""
    name = options.split
    images, labels = options.data / "normal_json" / name, options.data / "coco" / f"instances_{name}.json"
    train = coco.Split(images=images, annotations=labels)
    setup = Setup(
        data=coco.Config(train=train, val=train, ignore_categories=("DontCare",)),
        storage=options.storage,
        views=preset.views,
        evaluation_views=preset.evaluation,
        detector=preset.student,
        optim=preset.student_optim,
        methods=preset.methods[options.method],
        teaching=Teaching(folder=options.storage / "teacher", codec=options.codec),
    )
    assert setup.teaching is not None
    split = open_split(setup, "train", setup.views)
    if not (setup.teaching.folder / student_files.FACTS).exists():
        teacher = build_detector(replace(setup, detector=preset.teacher), split.dataset.categories)
        student_files.save(teacher, preset.teacher, split.dataset.categories, setup.teaching.folder)
    return setup, split


def ahead(writer: CacheWriter, split: Split, live: LiveTeacher) -> None:
    """Fill the cache as an actor does."""
    with Assembled(build.Split(dataset=split.dataset, views=split.views), 2, initializer=give_way) as pixels:
        filler = AheadOfWriting(pixels, live, torch.device("cpu"))
        filler.fill(writer, list(writer.pending()))
        filler.close()


def timed(setup: Setup, split: Split, methods: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step of every kind, round by round, each time in another order."""
    modes = {
        "live": Mode(source="live", methods=methods),
        "cached": Mode(source="cache", methods=methods, codec=options.codec),
        "student alone": Mode(source="none"),
    }
    contestants = {name: Contestant(setup, mode, split) for name, mode in modes.items()}
    for contestant in contestants.values():
        contestant.round(0, 1)  # the first steps of a process find no memory and no compiled kernel
    rounds = []
    for number in range(options.rounds):
        turns = random.Random(number).sample(list(contestants), len(contestants))
        found = {n: asdict(contestants[n].round(number * (options.steps + 1), options.steps)) for n in turns}
        rounds.append({"load": os.getloadavg()[0]} | {n: [found[n]["wall"], found[n]["cpu"]] for n in modes})
        print(f"round {number + 1} of {options.rounds}", flush=True)
    return rounds


def report(content: Mapping[str, Any]) -> None:
    """The steps that were measured, and what they make of a sweep."""
    rounds, steps, built = content["rounds"], content["steps"], content["build"]
    samples = content["images"] * content["views"]
    print(f"\n{content['method']} on HIT-UAV, {content['cores']} cores, {content['threads']} threads of torch")
    print(
        f"cache ({content['codec']}): {content['images']} images x {content['views']} views = {samples} samples, "
        f"{content['bytes'] / 1e6:.0f} MB, built in {built:.0f} s ({1e3 * built / samples:.1f} ms each)"
    )
    wall = {name: median(r[name][0] for r in rounds) for name in ("live", "cached", "student alone")}
    ratios = sorted(r["live"][0] / r["cached"][0] for r in rounds)
    seconds = ", ".join(f"{name} {s:.3f}" for name, s in wall.items())
    print(f"seconds per step of {content['batch']} images, medians of {len(rounds)} rounds: {seconds}")
    print(f"live / cached: {median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})\n")
    print(f"{'students':>9} {'steps each':>11} {'live, min':>10} {'cache + cached, min':>20} {'live / cache':>13}")
    for length in (steps, 10 * steps):
        for students in STUDENTS:
            live, cached = students * length * wall["live"], built + students * length * wall["cached"]
            print(f"{students:9} {length:11} {live / 60:10.1f} {cached / 60:20.1f} {live / cached:13.2f}")
    saved = wall["live"] - wall["cached"]
    after = f"after {built / saved:.0f} steps, of all students together" if saved > 0 else "never"
    print(f"the cache pays {after}; as many images are looked at in {samples / content['batch']:.0f} live steps")


if __name__ == "__main__":
    main()
