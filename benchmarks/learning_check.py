"""Does a method teach what the teacher sees of each image? On real images, with the task's loss off.

A student (ImageNet's backbone, frozen, so that a step costs little; pyramid and head learn) is taught by a method's own
loss alone, its gate open, images, views and masks fixed. 100 steps on the right taps must halve the loss of a new
student. Most of that fall has nothing to do with the images (a map's mean, the answer that suits most objects). So that
it does not hide the rest, another student settles first: it is shown the teacher's taps of images drawn anew in every
step, and learns what does not depend on the image. A method's assistant learns from the right taps meanwhile, and rests
from then on. From there it learns from the right taps, or from those of other images (all turned by one), for 100 steps
too; on images that neither has learnt from, measured with their right taps, the shuffle must take away at least half of
the fall.

The floor that MKD documents is taken off first; MGD's and LGD's cannot be computed. LGD, which has no teacher, is
shown the labels of other images; CLSD's classifier, which here knows ImageNet, their pixels. Settings are each method's
own, but for the gates; AdamW's steps do not depend on a loss's weight.

    python -m benchmarks.learning_check --data .../hit_uav --weights .../mobilenet_v2-b0353104.pth
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.classroom import every_method
from benchmarks.learning import FALL, SHUFFLED, check, total
from benchmarks.lecture import hit_uav, lecture, pupil, real_batches, trained_teacher
from benchmarks.plain_setup import keep_freed_memory
from benchmarks.store import Store, fingerprint
from data_sharding.datasets import coco
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.methods import clsd, hkd
from kd.methods.base import MethodConfig
from kd.sight import told_apart

ROOT = Path(__file__).parent.parent
IMAGENET = (981, 817, 671, 675)
"""Outputs of an ImageNet classifier for HIT-UAV's person, car, bicycle and other vehicle: ballplayer, sports car,
mountain bike, moving van."""


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = (options.steps, options.settle, options.images, options.teacher_steps)
    store = Store(options.results or ROOT / "benchmarks" / "results" / "learning_check.json", fingerprint(settings))
    if not options.show:
        _add_rows(store, options)
    print("\n".join(report(store.read())))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument("--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--settle", type=int, default=400, help="steps on taps of images drawn anew in each")
    parser.add_argument("--images", type=int, default=16, help="to learn from; as many are held out")
    parser.add_argument("--teacher-steps", type=int, default=400, help="that the teacher learns the task for, first")
    parser.add_argument("--teacher", type=Path, default=ROOT / "runs" / "learning_check_teacher", help="kept here")
    parser.add_argument("--methods", help="only these, with commas between")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/learning_check.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def _add_rows(store: Store, options: argparse.Namespace) -> None:
    """Every method's numbers that are not stored yet, told and stored as they come."""
    data = hit_uav(options.data)
    learnt, unseen = (real_batches(data, split, options.images) for split in ("train", "val"))
    # The teacher learns the task on more images, so that its sight is not of these alone.
    more = real_batches(data, "train", 4 * options.images)
    teacher, config = trained_teacher(
        options.teacher, options.weights, coco.categories(data), more, options.teacher_steps
    )
    student = pupil(config, options.weights)
    lectures = [lecture(student, teacher, batches) for batches in (learnt, unseen)]
    strides = tuple(2**level for level in student.levels)
    apart = ", ".join(f"{name} {share:.0%}" for name, share in told_apart([lectures[0].taps], strides).items())
    print(f"of what the teacher sees, this differs from image to image: {apart}", flush=True)
    done = {row["method"] for row in store.read()["rows"]}
    # CLSD last: its classifier looks at every crop in every step.
    for name, method in sorted(every_method().items(), key=lambda item: item[0] == "clsd"):
        if name in done or (options.methods and name not in options.methods.split(",")):
            continue
        method = _measurable(method, options.weights)
        row = {"method": name} | _row(name, method, student, teacher, *lectures, options.settle, options.steps)
        store.add(row)
        print("\n".join(_told(row)), flush=True)


def _measurable(method: MethodConfig, weights: Path) -> MethodConfig:
    """The method's settings, with a classifier for CLSD; and HKD's scale stays as its first step finds it, for a moving
    average follows the loss and would divide its fall away."""
    if isinstance(method, clsd.Config):
        return replace(method, weights=weights, classifier="mobilenet_v2", outputs=IMAGENET)
    return replace(method, settle=1) if isinstance(method, hkd.Config) else method


def _row(name: str, config: MethodConfig, student: fcos.Config, teacher: Detector, *rest: Any) -> dict[str, Any]:
    try:
        found = check(name, config, student, teacher, *rest)
    except ValueError as error:
        return {"refused": str(error)}
    numbers = {name: getattr(found, name) for name in ("fall", "settled_fall", "held_out", "removed", "verdict")}
    return vars(found) | numbers


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The table of what is stored."""
    yield f"wanted: a new student's loss falls by {FALL:.0%}; of a settled one's fall on images held out"
    yield f"{SHUFFLED:.0%} go by the shuffle\n"
    heads = f"{'new':>9} {'fall':>6} {'settled':>9} {'fall':>6} {'held out':>9} {'by shuffle':>11} {'s':>5}"
    yield f"{'method':12} {heads}  verdict"
    for row in content["rows"]:
        yield from _told(row)


def _told(row: Mapping[str, Any]) -> Iterator[str]:
    name = row["method"]
    if "refused" in row:
        yield f"{name:12} does not go with this pair: {row['refused']}"
        return
    falls = f"{total(row['new']):>9.3g} {row['fall']:>6.0%} {total(row['before']):>9.3g} {row['settled_fall']:>6.0%}"
    seen = f"{row['held_out']:>9.0%} {row['removed']:>11.0%}"
    yield f"{name:12} {falls} {seen} {row['seconds']:>5.0f}  {row['verdict']}"
    if row["verdict"] != "passes":
        for term in row["new"]:
            before, right, wrong = (row[f"held_out_{when}"][term] for when in ("before", "after", "shuffled"))
            yield f"{'':12} {term} on images held out: {before:.3g} settled, {right:.3g} then, shuffled {wrong:.3g}"


if __name__ == "__main__":
    main()
