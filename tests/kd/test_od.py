"""OD against its equations: hint, soft classes, and boxes bounded by the teacher's."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from data_sharding.batch import Outputs, Taps
from kd.detectors import fcos
from kd.methods import od
from kd.methods.base import Advice
from tests.kd import by_hand, detecting, fake
from tests.kd.detecting import every_detector


def test_the_hint_is_half_the_mean_squared_error_of_every_level() -> None:
    student, teacher = fake.taps(2, 1, canvas=(64, 64)), fake.taps(2, 2, canvas=(64, 64))
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        pairs = list(zip(s.double().flatten().tolist(), t.double().flatten().tolist(), strict=True))
        expected += 0.5 * 0.5 * sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    method = od.Loss(od.Config(soft=0, box=0), fake.pair())
    found = fake.run(method, student, teacher, fake.batch(2, canvas=(64, 64)))
    assert found["feat"].item() == pytest.approx(expected, rel=1e-5)
    assert found.keys() == {"feat"}


def test_classes_and_boxes_of_locations() -> None:
    """Soft coins everywhere on the image; squared errors of boxes where the student errs more than the teacher."""
    detector = detecting.detector(fcos, levels=(3, 4))
    batch = detecting.counted(detector, detecting.batch([[[10.0, 10, 40, 50], [3.0, 50, 60, 60]]], (64, 64)))
    mine, its = (_noise(detector, seed) for seed in (1, 2))
    answers = detector.answers(mine, batch)
    boxes, cls, box = torch.cat(batch.boxes).double().tolist(), 0.0, 0.0
    worse = []
    for place, cell in enumerate(by_hand.cells(mine.class_logits)):
        _, level, row, column = cell
        pairs = zip(by_hand.at(its.class_logits, cell), by_hand.at(mine.class_logits, cell), strict=True)
        cls += sum(by_hand.coin(t, s) for t, s in pairs)
        if answers.truth[place] >= 0:
            stride, truth = (8, 16)[level], boxes[int(answers.truth[place])]
            x, y = column * stride, row * stride
            wanted = [v / stride for v in (x - truth[0], y - truth[1], truth[2] - x, truth[3] - y)]
            errors = [
                sum((a - max(b, 0.0)) ** 2 for a, b in zip(by_hand.at(o.box_deltas, cell), wanted, strict=True))
                for o in (mine, its)
            ]
            worse.append(errors[0] > errors[1])
            box += errors[0] if worse[-1] else 0.0
    assert set(worse) == {True, False}
    method = od.Loss(od.Config(hint=0, soft=0.5, box=0.25), fake.pair(detector.shapes, detector.shapes))
    found = method.losses(Taps(), mine, Taps(), batch, Advice(detector, ask=lambda: its))
    positives = float(batch.totals["positives"])
    assert found["cls"].item() == pytest.approx(0.5 * cls / positives, rel=1e-5)
    assert found["box"].item() == pytest.approx(0.25 * box / positives, rel=1e-5)


def _noise(detector: detecting.Detector, seed: int) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    sizes = [(8, 8), (4, 4)]
    classes, boxes, centre = (
        tuple(torch.randn(1, channels, *size, generator=draw) for size in sizes) for channels in (3, 4, 1)
    )
    return Outputs(classes, tuple(b.abs() for b in boxes), centre)


@every_detector
@pytest.mark.parametrize("boxes", [detecting.SOME, [[], []]], ids=["some", "none"])
def test_a_teacher_that_says_what_the_student_says_teaches_nothing(module: ModuleType, boxes: list) -> None:
    detector = detecting.detector(module)
    batch = detecting.counted(detector, detecting.batch(boxes))
    outputs = detecting.outputs_of(detector, batch)
    method = od.Loss(od.Config(hint=0), fake.pair(detector.shapes, detector.shapes))
    terms = method.losses(Taps(), outputs, Taps(), batch, Advice(detector, ask=outputs.detach))
    assert all(abs(term.item()) < 1e-6 for term in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in detector.parameters())


def test_the_hint_alone_asks_no_head_and_goes_with_any_pair() -> None:
    other = replace(fake.SHAPES, places=("retinanet",))
    assert not od.Loss(od.Config(soft=0, box=0), fake.pair(teacher=other)).needs_head
    with pytest.raises(ValueError, match="od compares"):
        od.Loss(od.Config(), fake.pair(teacher=other))
    with pytest.raises(ValueError, match="hint must be >= 0"):
        od.Config(hint=-1)
