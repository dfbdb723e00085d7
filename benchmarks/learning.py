"""One method's learning on real images, from where a student has settled: see `benchmarks.learning_check`."""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.classroom import Classroom
from benchmarks.lecture import BATCH, CPU, Lecture, Remembered, optim_config
from data_sharding.batch import Outputs
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.methods import mkd
from kd.methods.base import Advice, MethodConfig, Pair
from kd.teacher import aligned_shapes

FALL, SHUFFLED = 0.5, 0.5
"""What is wanted: the share of a new student's loss that goes in its first steps; and, of what a settled one's loss
falls by, the share that goes by the shuffle."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one method: its terms on the images that were learnt from, and on others."""

    new: Mapping[str, float]
    """Of a new student."""
    learnt: Mapping[str, float]
    """After its first steps, all on the right taps."""
    before: Mapping[str, float]
    """Settled."""
    after: Mapping[str, float]
    """Settled, then taught with the right taps."""
    held_out_before: Mapping[str, float]
    held_out_after: Mapping[str, float]
    held_out_shuffled: Mapping[str, float]
    """After learning from the wrong taps."""
    seconds: float
    """Of this process's processors."""

    @property
    def fall(self) -> float:
        """Share of a new student's loss that is gone after its first steps."""
        return 1 - total(self.learnt) / total(self.new)

    @property
    def settled_fall(self) -> float:
        """The same from where a student has settled."""
        return 1 - total(self.after) / total(self.before)

    @property
    def held_out(self) -> float:
        """Share of the loss on held-out images that is gone."""
        return 1 - total(self.held_out_after) / total(self.held_out_before)

    @property
    def removed(self) -> float:
        """Share of the fall on held-out images that the shuffle takes away."""
        before, after, shuffled = map(total, (self.held_out_before, self.held_out_after, self.held_out_shuffled))
        return (shuffled - after) / (before - after) if before > after else 0.0

    @property
    def verdict(self) -> str:
        """`passes`, or what is missing."""
        learns, theirs = self.fall >= FALL, self.removed >= SHUFFLED
        return "passes" if learns and theirs else "does not see the images" if learns else "does not learn"


def total(terms: Mapping[str, float]) -> float:
    """The loss."""
    return sum(terms.values())


def check(
    name: str, config: MethodConfig, student: fcos.Config, teacher: Detector,
    learnt: Lecture, unseen: Lecture, settle: int, steps: int,
) -> Found:  # fmt: skip
    """Let a student learn at once; and one that has settled from the right taps, or from others'; all measured with the
    right ones."""
    began = time.process_time()
    classes = teacher.shapes.num_classes
    room = Classroom(student, teacher, classes, name, config, optim_config(settle + steps), CPU)
    room.student.backbone = Remembered(room.student.backbone)
    floors = [_floor(room, teacher, config, shown) if name == "mkd" else {} for shown in (learnt, unseen)]
    by_labels = not config.taught and bool(room.assistants)
    new = mean_terms(room, learnt, floors[0])
    at_once = deepcopy(room)
    for step in range(steps):
        _learn(at_once, *learnt.shown(step % len(learnt.batches)))
    _settle(room, learnt, settle, by_labels)
    settled = [mean_terms(room, *shown) for shown in zip((learnt, unseen), floors, strict=True)]
    shuffled = deepcopy(room)
    turned = torch.arange(len(learnt)).roll(-1)
    for step in range(steps):
        _learn(room, *learnt.shown(step % len(learnt.batches)))
        _learn(shuffled, *learnt.shown(step % len(learnt.batches), turned, by_labels))
    return Found(
        new=new,
        learnt=mean_terms(at_once, learnt, floors[0]),
        before=settled[0],
        after=mean_terms(room, learnt, floors[0]),
        held_out_before=settled[1],
        held_out_after=mean_terms(room, unseen, floors[1]),
        held_out_shuffled=mean_terms(shuffled, unseen, floors[1]),
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
def mean_terms(room: Classroom, lecture: Lecture, floor: Mapping[str, float]) -> dict[str, float]:
    """The method's own terms above their floors, each averaged over the batches."""
    return _mean([room.own_terms(*lecture.shown(i)) for i in range(len(lecture.batches))], floor)


@torch.no_grad()
def _floor(room: Classroom, teacher: Detector, config: MethodConfig, lecture: Lecture) -> dict[str, float]:
    """MKD's FDMD keeps the energy of what its mask blanks out, also where the student is the teacher."""
    assert isinstance(config, mkd.Config)
    shapes = aligned_shapes(teacher.shapes, room.student.shapes)
    method, images = mkd.Loss(config, Pair(student=shapes, teacher=shapes)), torch.tensor(float(BATCH))
    found = []
    for number in range(len(lecture.batches)):
        batch, taps = lecture.shown(number)
        counted = batch.with_totals({"images": images})
        found.append(method.losses(taps, Outputs((), ()), taps, counted, Advice(room.student)))
    return _mean(found, {})


def _mean(found: Sequence[Mapping[str, Tensor]], floor: Mapping[str, float]) -> dict[str, float]:
    return {name: sum(terms[name].item() for terms in found) / len(found) - floor.get(name, 0.0) for name in found[0]}
