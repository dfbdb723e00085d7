"""LD against its equations: distributions of box sides on objects and near them."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from data_sharding.batch import Outputs, Taps
from kd.blocks.valuable import adaptive_threshold, valuable
from kd.methods import ld
from tests.kd import by_hand, fake

CANVAS = (64, 96)


def scene() -> tuple[Taps, Taps, fake.Batch]:
    batch = fake.batch(2, 0, canvas=CANVAS)
    boxes = (torch.tensor([[4.0, 4.0, 44.0, 60.0], [60.0, 10.0, 75.0, 30.0]]), torch.zeros(0, 4))
    labels = torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)
    return fake.taps(2, 1, canvas=CANVAS), fake.taps(2, 2, canvas=CANVAS), fake.with_boxes(batch, boxes, labels)


def square(cell: by_hand.Cell) -> list[float]:
    """Eight strides around a cell's middle."""
    _, level, row, column = cell
    stride = fake.STRIDES[level]
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    return [x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride]


def diou(a: list[float], b: list[float]) -> float:
    apart = math.dist(by_hand.middle(a), by_hand.middle(b))
    hull = math.dist((min(a[0], b[0]), min(a[1], b[1])), (max(a[2], b[2]), max(a[3], b[3])))
    return by_hand.iou(a, b) - (apart / hull) ** 2


def threshold(box: list[float], cells: list[by_hand.Cell]) -> float:
    found: list[float] = []
    for level in range(3):
        near = sorted(
            (square(c) for c in cells if c[1] == level), key=lambda s: math.dist(by_hand.middle(s), by_hand.middle(box))
        )
        found += [by_hand.iou(s, box) for s in near[:9]]
    return statistics.mean(found) + statistics.stdev(found)


def near(boxes: list[list[float]], cells: list[by_hand.Cell], low: float = 0.25) -> list[float]:
    """Each cell's greatest IoU with a box in whose region it lies."""
    limited = [(box, threshold(box, cells)) for box in boxes]
    return [
        max((by_hand.iou(s, b) for b, a in limited if low * a <= diou(s, b) < a), default=0.0)
        for s in map(square, cells)
    ]


def test_the_region_near_an_object_is_between_two_thresholds() -> None:
    _, _, batch = scene()
    outputs = fake.FakeDetector().predict(fake.taps(2, 1, canvas=CANVAS).pyramid, batch.geometry)
    answers = fake.FakeDetector().answers(outputs, batch)
    cells = [c for c in by_hand.cells(outputs.class_logits) if c[0] == 0]
    # Boxes off the middle of the cells: equally near candidates would be chosen by chance.
    boxes = torch.tensor([[4.3, 4.1, 44.0, 60.6], [60.3, 11.9, 75.0, 30.7], [30.1, 30.4, 31.1, 31.4]])
    image = torch.zeros(len(boxes), dtype=torch.int64)
    found = valuable(answers.places[: len(cells)], answers.lengths, boxes, image, 1, 0.25)[0]
    limits = adaptive_threshold(answers.places[: len(cells)], answers.lengths, boxes)
    assert limits.tolist() == pytest.approx([threshold(b, cells) for b in boxes.double().tolist()], rel=1e-4)
    assert found.tolist() == pytest.approx(near(boxes.double().tolist(), cells), abs=1e-5)
    assert 0 < (found > 0).sum() < len(cells)
    assert valuable(answers.places[: len(cells)], answers.lengths, boxes[:0], image[:0], 1, 0.25).sum() == 0
    both = valuable(answers.places[: len(cells)], answers.lengths, boxes, image + 1, 3, 0.25)
    assert torch.equal(both[1], found), "each image has the region of its own boxes"
    assert both[0].sum() == both[2].sum() == 0


def test_it_is_the_divergence_of_sides_and_classes() -> None:
    student, teacher, batch = scene()
    detector = fake.FakeDetector()
    mine, its = (detector.predict(x.pyramid, batch.geometry) for x in (student, teacher))
    cells = [c for c in by_hand.cells(mine.class_logits) if c[0] == 0]  # the other image is empty
    positive = detector.answers(mine, batch).positive.tolist()
    places, boxes = detector.answers(mine, batch).places[: len(cells)], batch.boxes[0]
    image = torch.zeros(len(boxes), dtype=torch.int64)
    region = valuable(places, (96, 24, 6), boxes, image, 1, 0.25)[0].tolist()
    box = cls = 0.0
    for place, cell in enumerate(cells):
        weight = 0.25 if positive[place] else 0.5 / 4 * region[place]
        if weight:
            box += weight * sum(100 * kl for kl in _sides(mine, its, cell)) / 4
        if positive[place]:
            t, s = (by_hand.softmax([v / 2 for v in by_hand.at(o.class_logits, cell)]) for o in (its, mine))
            cls += 4 * by_hand.kl(t, s) / 3
    found = fake.run(ld.Loss(ld.Config(vlr=0.5), fake.pair()), student, teacher, batch, detector)
    positives = float(batch.totals["positives"])
    assert found["box"].item() == pytest.approx(box / positives, rel=1e-5)
    assert found["cls"].item() == pytest.approx(10 * cls / positives, rel=1e-5)
    assert sum(region) > 0


def _sides(mine: Outputs, its: Outputs, cell: by_hand.Cell) -> list[float]:
    pairs = [[by_hand.at(o.box_deltas, cell)[5 * i : 5 * i + 5] for o in (its, mine)] for i in range(4)]
    return [by_hand.kl(*(by_hand.softmax([v / 10 for v in side]) for side in pair)) for pair in pairs]


def test_without_the_region_only_objects_teach() -> None:
    student, teacher, batch = scene()
    with_region, without = (
        fake.run(ld.Loss(ld.Config(vlr=w), fake.pair()), student, teacher, batch)["box"].item() for w in (0.25, 0.0)
    )
    assert 0 < without < with_region


def test_defaults_follow_the_detector() -> None:
    retina = replace(fake.SHAPES, places=("retinanet",))
    one, other = ld.Loss(ld.Config(), fake.pair()), ld.Loss(ld.Config(), fake.pair(retina, retina))
    assert (one.main, one.cls_temperature) == (0.25, 2.0)
    assert (other.main, other.cls_temperature) == (5.0, 8.0)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_heads_without_distributions_are_refused_with_what_to_set(who: str) -> None:
    plain = {who: replace(fake.SHAPES, bins=None)}
    with pytest.raises(ValueError, match=f"which the {who}'s head does not have; set bins to 16"):
        ld.Loss(ld.Config(), fake.pair(plain.get("student", fake.SHAPES), plain.get("teacher", fake.SHAPES)))
    with pytest.raises(ValueError, match="ld compares"):
        ld.Loss(ld.Config(), fake.pair(teacher=replace(fake.SHAPES, places=("fake", "bins 8"), bins=8)))
    with pytest.raises(ValueError, match="low must be"):
        ld.Config(low=1)
