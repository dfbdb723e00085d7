"""Does a method teach what the teacher sees of each image? On real images, with the task's loss off.

A student (ImageNet's backbone, frozen, so that a step costs little; pyramid and head learn) is taught by a method's own
loss alone, its gate open, images, views and masks fixed. First it settles: it is
shown the teacher's taps of images drawn anew in every step, and learns what does not depend on the image (a map's
mean, the answer that suits most objects), which is most of what a new student lacks. A method's assistant learns from
the right taps meanwhile, and rests from then on. From there, 100 steps on the right taps must halve the loss; and a
student that was taught with the taps of other images (all turned by one) must not come as far on images that neither
has learnt from, measured with their right taps: the shuffle takes away at least half of the fall there.

What a method documents as its floor is taken off first. LGD, which has no teacher, is shown the labels of other
images; CLSD's classifier, which here knows ImageNet, their pixels. Settings are each method's own, but for the gates;
AdamW's steps do not depend on a loss's weight.

    python -m benchmarks.learning_check --data .../hit_uav --weights .../mobilenet_v2-b0353104.pth
"""

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.classroom import Classroom, every_method
from benchmarks.lecture import (
    CPU,
    Lecture,
    Remembered,
    hit_uav,
    lecture,
    optim_config,
    pupil,
    real_batches,
    trained_teacher,
)  # fmt: skip
from benchmarks.plain_run import keep_freed_memory
from benchmarks.store import Store, fingerprint
from data_sharding.datasets import coco
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.methods.base import MethodConfig

ROOT = Path(__file__).parent.parent
FALL, SHUFFLED = 0.5, 0.5
IMAGENET = (981, 817, 671, 675)
"""Outputs of an ImageNet classifier for HIT-UAV's person, car, bicycle and other vehicle: ballplayer, sports car,
mountain bike, moving van."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one method: its terms on the images that were learnt from, and on others."""

    new: Mapping[str, float]
    """Of a new student."""
    before: Mapping[str, float]
    """Settled."""
    after: Mapping[str, float]
    held_out_before: Mapping[str, float]
    held_out_after: Mapping[str, float]
    held_out_shuffled: Mapping[str, float]
    """After learning from the wrong taps."""
    seconds: float
    """Of this process's processors."""

    @property
    def fall(self) -> float:
        """Share of the loss that is gone."""
        return 1 - _sum(self.after) / _sum(self.before)

    @property
    def held_out(self) -> float:
        """Share of the loss on held-out images that is gone."""
        return 1 - _sum(self.held_out_after) / _sum(self.held_out_before)

    @property
    def removed(self) -> float:
        """Share of the fall on held-out images that the shuffle takes away."""
        before, after, shuffled = map(_sum, (self.held_out_before, self.held_out_after, self.held_out_shuffled))
        return (shuffled - after) / (before - after) if before > after else 0.0

    @property
    def verdict(self) -> str:
        """`passes`, or what is missing."""
        learns, theirs = self.fall >= FALL, self.removed >= SHUFFLED
        return "passes" if learns and theirs else "does not see the images" if learns else "does not learn"


def _sum(terms: Mapping[str, float]) -> float:
    return sum(terms.values())


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
    parser.add_argument("--settle", type=int, default=40, help="steps on taps of images drawn anew in each")
    parser.add_argument("--images", type=int, default=8, help="to learn from; as many are held out")
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
    # The teacher learns the task on eight times as many images, so that its sight is not of these alone.
    more = real_batches(data, "train", 8 * options.images)
    teacher, config = trained_teacher(
        options.teacher, options.weights, coco.categories(data), more, options.teacher_steps
    )
    student = pupil(config, options.weights)
    lectures = [lecture(student, teacher, batches) for batches in (learnt, unseen)]
    done = {row["method"] for row in store.read()["rows"]}
    # CLSD last: its classifier looks at every crop in every step.
    for name, method in sorted(every_method().items(), key=lambda item: item[0] == "clsd"):
        if name in done or (options.methods and name not in options.methods.split(",")):
            continue
        if name == "clsd":
            method = replace(method, weights=options.weights, classifier="mobilenet_v2", outputs=IMAGENET)
        row = {"method": name} | _row(name, method, student, teacher, *lectures, options.settle, options.steps)
        store.add(row)
        print("\n".join(_told(row)), flush=True)


def _row(name: str, config: MethodConfig, student: fcos.Config, teacher: Detector, *rest: Any) -> dict[str, Any]:
    try:
        found = check(name, config, student, teacher, *rest)
    except ValueError as error:
        return {"refused": str(error)}
    numbers = {"fall": found.fall, "held_out": found.held_out, "removed": found.removed, "verdict": found.verdict}
    return vars(found) | numbers


def check(
    name: str, config: MethodConfig, student: fcos.Config, teacher: Detector,
    learnt: Lecture, unseen: Lecture, settle: int, steps: int,
) -> Found:  # fmt: skip
    """Let a student settle, then learn from the right taps, or from others'; both measured with the right ones."""
    began = time.process_time()
    classes = teacher.shapes.num_classes
    room = Classroom(student, teacher, classes, name, config, optim_config(settle + steps), CPU)
    room.student.backbone = Remembered(room.student.backbone)
    by_labels = not config.taught and bool(room.assistants)
    new = mean_terms(room, learnt)
    _settle(room, learnt, settle, by_labels)
    settled, shuffled = mean_terms(room, learnt), copy.deepcopy(room)
    unseen_before = mean_terms(room, unseen)
    for step in range(steps):
        _learn(room, *learnt.shown(step % len(learnt.batches)))
    turned = torch.arange(len(learnt)).roll(-1)
    for step in range(steps):
        _learn(shuffled, *learnt.shown(step % len(learnt.batches), turned, by_labels))
    return Found(
        new=new,
        before=settled,
        after=mean_terms(room, learnt),
        held_out_before=unseen_before,
        held_out_after=mean_terms(room, unseen),
        held_out_shuffled=mean_terms(shuffled, unseen),
        seconds=time.process_time() - began,
    )


def _settle(room: Classroom, lecture: Lecture, steps: int, by_labels: bool) -> None:
    """Steps on the taps of others, drawn anew in each; the assistant learns from the right ones."""
    generator, count = torch.Generator().manual_seed(0), len(lecture)
    for step in range(steps):
        number = step % len(lecture.batches)
        if room.assistants:
            with torch.no_grad():
                room.own_terms(*lecture.shown(number), learns=True)
        others = (torch.arange(count) + torch.randint(1, count, (count,), generator=generator)) % count
        _learn(room, *lecture.shown(number, others, by_labels))


def _learn(room: Classroom, *shown: Any) -> None:
    """A step on the method's own loss alone; its assistant rests."""
    room.engine.backward(torch.stack(list(room.own_terms(*shown).values())).sum())
    room.engine.step()


@torch.no_grad()
def mean_terms(room: Classroom, lecture: Lecture) -> dict[str, float]:
    """The method's own terms, each averaged over the batches."""
    count = len(lecture.batches)
    found = [room.own_terms(*lecture.shown(i)) for i in range(count)]
    return {name: sum(terms[name].item() for terms in found) / count for name in found[0]}


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The table of what is stored."""
    yield f"wanted: a fall of {FALL:.0%} from where the student has settled, of it {SHUFFLED:.0%} gone by the shuffle;"
    yield "losses of a new student and of one that has settled, falls from there\n"
    yield f"{'method':12} {'new':>9} {'settled':>9} {'fall':>6} {'held out':>9} {'by shuffle':>11} {'s':>5}  verdict"
    for row in content["rows"]:
        yield from _told(row)


def _told(row: Mapping[str, Any]) -> Iterator[str]:
    name = row["method"]
    if "refused" in row:
        yield f"{name:12} does not go with this pair: {row['refused']}"
        return
    yield (
        f"{name:12} {_sum(row['new']):>9.3g} {_sum(row['before']):>9.3g} {row['fall']:>6.0%} {row['held_out']:>9.0%} "
        f"{row['removed']:>11.0%} {row['seconds']:>5.0f}  {row['verdict']}"
    )


if __name__ == "__main__":
    main()
