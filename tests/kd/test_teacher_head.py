"""A teacher's head answers on the student's grid, the same beside a live and a cached teacher, once a step at most."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, StoredTaps, Taps
from data_sharding.world import World
from kd.blocks.align import Rule
from kd.clock import Clock
from kd.distiller import Distiller, Lesson, Moment
from kd.methods.base import Advice, Method, MethodConfig, check_comparable
from kd.step import global_totals
from kd.teacher import CachedTeacher, LiveTeacher, TeacherHead
from tests.kd import fake, runs
from tests.kd.detecting import every_detector, name_of
from tests.kd.test_teacher import stored

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Seeing:
    factor: int = 2
    align: Rule = "shift"
    precision: Literal["fp32", "bf16"] = "fp32"


def tensors(outputs: Outputs) -> list[Tensor]:
    rois = (outputs.roi_logits, outputs.roi_deltas)
    maps = (*outputs.class_logits, *outputs.box_deltas, *outputs.centerness)
    return [*maps, *outputs.proposals, *(x for x in rois if x is not None)]


def equal(a: Outputs, b: Outputs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def taught(name: str) -> tuple[LiveTeacher, TeacherHead, Batch, Taps, tuple[Tensor, ...]]:
    """A live teacher at 2x, its head, a batch, what the teacher sees in it, and the student's proposals."""
    student = runs.detector(0, name=name).eval()
    teacher = runs.live_teacher(student, name)
    batch = runs.images_of(0)
    with torch.no_grad():
        pyramid = student.features(student.normalise(batch.images, batch.geometry)).pyramid
        proposals = student.predict(pyramid, batch.geometry).proposals
    return teacher, TeacherHead(teacher.detector, student.shapes, Seeing(), CPU), batch, teacher(batch), proposals


@every_detector
def test_the_head_answers_on_the_students_grid_of_the_students_proposals(module: ModuleType) -> None:
    teacher, head, batch, taps, proposals = taught(name_of(module))
    found = head(taps, batch.geometry, proposals)
    by_hand = teacher.detector.on_grid(runs.detector(0).shapes.strides)
    with torch.no_grad():
        assert equal(found, by_hand.predict(taps.pyramid, batch.geometry, proposals or None))
    assert not any(x.requires_grad for x in tensors(found))
    assert all(torch.equal(mine, its) for mine, its in zip(found.proposals, proposals, strict=True))


@every_detector
def test_cached_taps_give_the_same_answers(module: ModuleType) -> None:
    teacher, head, batch, taps, proposals = taught(name_of(module))
    travelling = StoredTaps(None, tuple(stored("fp32", x) for x in taps.pyramid))
    cached = CachedTeacher("big", teacher.shapes)(replace(batch, cached={"big": travelling}))
    assert equal(head(cached, batch.geometry, proposals), head(teacher(batch), batch.geometry, proposals))


def test_the_students_autocast_does_not_reach_the_head_but_its_own_does() -> None:
    teacher, head, batch, taps, _ = taught("fcos")
    exact = head(taps, batch.geometry)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(head(taps, batch.geometry), exact)
    rough = TeacherHead(teacher.detector, runs.detector(0).shapes, Seeing(precision="bf16"), CPU)(taps, batch.geometry)
    assert rough.class_logits[0].dtype == torch.bfloat16
    torch.testing.assert_close(rough.class_logits[0].float(), exact.class_logits[0], rtol=0.05, atol=0.05)


def test_only_the_head_is_kept_and_the_teacher_keeps_its_features() -> None:
    detector = runs.detector(1, width=16)
    head = TeacherHead(detector, runs.detector(0).shapes, Seeing(), CPU)
    assert {name.partition(".")[0] for name, _ in head._head.named_parameters()} == {"head"}
    batch = runs.images_of(0)
    assert detector.features(detector.normalise(batch.images, batch.geometry)).c5 is not None


def test_a_pooled_teacher_of_more_pixels_is_refused() -> None:
    detector, shapes = runs.detector(1, width=16), runs.detector(0).shapes
    with pytest.raises(ValueError, match=r"align to 'shift' or its factor to 1"):
        TeacherHead(detector, shapes, Seeing(align="pool"), CPU)
    TeacherHead(detector, shapes, Seeing(factor=1, align="pool"), CPU)


class Asking(Method):
    """A method that asks twice."""

    needs_head = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Outputs] = []

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        self.seen += [advice.teacher_outputs, advice.teacher_outputs]
        return {"feat": outputs.class_logits[0].sum() * 0}


def distilled(methods: int, start: float = 0.0) -> tuple[list[Asking], list[int], Distiller, Callable[[], object]]:
    """Several methods that learn from one teacher, how often its head was run, and a forward."""
    _, head, batch, taps, _ = taught("faster_rcnn")
    calls, inner = [0], head._head.predict

    def counting(*args: object) -> Outputs:
        calls[0] += 1
        return inner(*args)  # pyright: ignore[reportArgumentType]

    head._head.predict = counting  # pyright: ignore[reportAttributeAccessIssue]
    asking, student = [Asking() for _ in range(methods)], runs.detector(0, name="faster_rcnn")
    lessons = {
        f"m{i}": (Lesson(name=f"m{i}", teacher="big", config=MethodConfig(start=start), head=head), method)
        for i, method in enumerate(asking)
    }
    distiller = Distiller(student, lessons)
    batch = batch.with_totals(global_totals(distiller, [batch], World()))
    return asking, calls, distiller, lambda: distiller(batch, {"big": taps}, {}, Moment(progress=0.0, clock=Clock()))


def test_the_head_is_run_once_however_many_ask_and_about_the_students_regions() -> None:
    asking, calls, distiller, forward = distilled(3)
    forward()
    assert calls == [1]
    answers = [outputs for method in asking for outputs in method.seen]
    assert all(outputs is answers[0] for outputs in answers)
    assert len(answers[0].proposals) == runs.IMAGES
    alone = runs.detector(0, name="faster_rcnn")
    assert len(list(distiller.parameters())) == len(list(alone.parameters()))  # in no optimizer and no checkpoint


def test_the_head_rests_while_no_method_is_on() -> None:
    _, calls, _, forward = distilled(2, start=0.5)
    forward()
    assert calls == [0]


def test_who_asks_without_a_head_is_told() -> None:
    with pytest.raises(ValueError, match="needs_head"):
        _ = Advice(fake.FakeDetector()).teacher_outputs


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"places": ("retinanet", "anchors")}, r"fcos, 0.0, 3 classes.*retinanet, anchors, 3 classes"),
        ({"num_classes": 7}, r"3 classes.*7 classes"),
        ({"strides": (8, 16)}, r"strides \(8, 16, 32\)"),
    ],
)
def test_heads_that_answer_about_other_places_are_refused(changed: Any, told: str) -> None:
    shapes = replace(fake.SHAPES, places=("fcos", 0.0))
    check_comparable(fake.pair(shapes, replace(shapes, pyramid_channels=4)), "it")
    with pytest.raises(ValueError, match=told):
        check_comparable(fake.pair(shapes, replace(shapes, **changed)), "it")


@every_detector
def test_a_detector_says_what_its_answers_are_of(module: ModuleType) -> None:
    settings: Any = {"point_offset": 0.5} if name_of(module) == "fcos" else {"anchor_ratios": (1.0,)}
    one, same, other = (runs.detector(0, name=name_of(module), **x).shapes.places for x in ({}, {}, settings))
    assert one == same != other
    assert one[0] == name_of(module)
