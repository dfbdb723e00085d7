"""DeFeat against its equations: objects and background apart, on the pyramid and on regions."""

import math
from dataclasses import replace

import pytest
import torch

from data_sharding.batch import Taps
from kd.methods import defeat
from kd.methods.base import Advice
from tests.kd import by_hand, fake
from tests.kd.test_hinton import regions

CANVAS = (64, 96)
BOXES = [[[3.0, 3.0, 20.0, 30.0], [40.0, 8.0, 41.0, 9.0]], [[0.0, 0.0, 96.0, 64.0]], []]


def scene() -> tuple[Taps, Taps, fake.Batch]:
    """A small box and one of a pixel, one that fills the image, none."""
    batch = fake.batch(3, 0, canvas=CANVAS)
    boxes = tuple(torch.tensor(b).reshape(-1, 4) for b in BOXES)
    labels = tuple(torch.zeros(len(b), dtype=torch.int64) for b in boxes)
    return fake.taps(3, 1, canvas=CANVAS), fake.taps(3, 2, canvas=CANVAS), fake.with_boxes(batch, boxes, labels)


def level_of(box: list[float]) -> int:
    """FPN's eq. 1, within the levels of the tests (strides 8, 16, 32)."""
    return min(2, max(0, math.floor(4 + math.log2(math.sqrt(by_hand.area(box)) / 224 + 1e-6)) - 3))


@pytest.mark.parametrize(("foreground", "background"), [(3.0, 0.0), (0.0, 12.0), (3.0, 12.0)])
def test_it_is_the_mean_squared_error_of_both_parts(foreground: float, background: float) -> None:
    student, teacher, batch = scene()
    expected = 0.0
    for level, (s, t) in enumerate(zip(student.pyramid, teacher.pyramid, strict=True)):
        for image in range(3):
            parts: dict[bool, list[float]] = {True: [], False: []}
            for row in range(s.shape[2]):
                for column in range(s.shape[3]):
                    stride = fake.STRIDES[level]
                    cell = [column * stride, row * stride, (column + 1) * stride, (row + 1) * stride]
                    on = any(
                        cell[0] < b[2] and b[0] < cell[2] and cell[1] < b[3] and b[1] < cell[3]
                        for b in BOXES[image]
                        if level_of(b) == level
                    )
                    a, b = (x[image, :, row, column].double() for x in (s, t))
                    parts[on].append(float((a - b).square().mean()))
            on, off = (sum(x) / max(1, len(x)) for x in (parts[True], parts[False]))
            expected += (foreground * on + background * off) / 2 / 3 / 3  # half, images, levels
    config = defeat.Config(foreground=foreground, background=background)
    found = fake.run(defeat.Loss(config, fake.pair()), student, teacher, batch)
    assert found["feat"].item() == pytest.approx(expected, rel=1e-5)
    assert found.keys() == {"feat"}


@pytest.mark.parametrize(("objects", "rest"), [(2.0, 0.0), (0.0, 2.0), (1.0, 3.0)])
def test_regions_on_objects_and_the_others_are_means_of_their_own(objects: float, rest: float) -> None:
    detector, mine, its, batch = regions()
    assert mine.roi_logits is not None
    assert its.roi_logits is not None
    kl = [
        by_hand.kl(*(by_hand.softmax(x[region].double().tolist()) for x in (its.roi_logits, mine.roi_logits)))
        for region in range(3)
    ]
    # The first image has a region on its object and one beside it, the second one region on nothing.
    expected = (objects * kl[0] + rest * kl[1] + rest * kl[2]) / 2
    config = defeat.Config(objects=objects, rest=rest)
    method = defeat.Loss(config, fake.pair(detector.shapes, detector.shapes))
    pyramid = tuple(torch.zeros(2, 16, 128 // s, 128 // s) for s in detector.shapes.strides)
    found = method.losses(Taps(None, pyramid), mine, Taps(None, pyramid), batch, Advice(detector, ask=lambda: its))
    assert found["cls"].item() == pytest.approx(expected, rel=1e-5)


def test_class_terms_are_two_stage_by_default_and_need_equal_heads() -> None:
    one, two = (replace(fake.SHAPES, family=family) for family in ("one_stage", "two_stage"))
    other = replace(two, places=("other",))
    assert not defeat.Loss(defeat.Config(), fake.pair(one, other)).needs_head
    assert defeat.Loss(defeat.Config(), fake.pair(two, two)).needs_head
    assert defeat.Loss(defeat.Config(), fake.pair(two, two)).rest == 2.0
    with pytest.raises(ValueError, match="defeat with class terms"):
        defeat.Loss(defeat.Config(), fake.pair(two, other))
    defeat.Loss(defeat.Config(objects=0, rest=0), fake.pair(two, other))
    with pytest.raises(ValueError, match="temperature"):
        defeat.Config(temperature=0)


def test_a_dense_heads_classes_can_teach_apart_too() -> None:
    student, teacher, batch = scene()
    detector = fake.FakeDetector()
    mine, its = (detector.predict(x.pyramid, batch.geometry) for x in (student, teacher))
    positive = detector.answers(mine, batch).positive.tolist()
    sums: dict[tuple[int, bool], list[float]] = {}
    for place, cell in enumerate(by_hand.cells(mine.class_logits)):
        pairs = zip(by_hand.at(its.class_logits, cell), by_hand.at(mine.class_logits, cell), strict=True)
        sums.setdefault((cell[0], positive[place]), []).append(sum(by_hand.coin(t, s) for t, s in pairs))
    expected = sum((1.5 if on else 0.5) * sum(x) / len(x) / 3 for (_, on), x in sums.items())
    method = defeat.Loss(defeat.Config(objects=1.5, rest=0.5), fake.pair())
    assert fake.run(method, student, teacher, batch, detector)["cls"].item() == pytest.approx(expected, rel=1e-5)
