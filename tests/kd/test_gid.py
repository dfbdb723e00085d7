"""GID against its equations: which instances, their features, how they stand to each other, and answers near them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from data_sharding.batch import Outputs, Taps
from kd.blocks.disagreement import instances
from kd.blocks.relation import relation_error
from kd.methods import gid
from kd.methods.base import Advice
from tests.kd import by_hand, fake
from tests.kd.test_hinton import regions

CANVAS = (64, 96)


def scene() -> tuple[Taps, Taps, fake.Batch]:
    batch = fake.batch(2, canvas=CANVAS)
    batch = replace(batch, geometry=replace(batch.geometry, sizes=torch.tensor([[64, 96], [50, 70]])))
    return fake.taps(2, 1, canvas=CANVAS), fake.taps(2, 2, canvas=CANVAS), batch


def chosen(most: int = 4) -> tuple[list[list[tuple[list[float], int]]], Outputs, Outputs, fake.Batch]:
    """Per image boxes and labels of the instances, found in plain Python."""
    student, teacher, batch = scene()
    detector = fake.FakeDetector()
    mine, its = (detector.predict(x.pyramid, batch.geometry) for x in (student, teacher))
    found: list[list[tuple[float, list[float], int]]] = [[], []]
    for cell in by_hand.cells(mine.class_logits):
        image, level, row, column = cell
        height, width = batch.geometry.sizes[image].tolist()
        stride = fake.STRIDES[level]
        x, y = (column + 0.5) * stride, (row + 0.5) * stride
        p, q = ([by_hand.sigmoid(v) for v in by_hand.at(o.class_logits, cell)] for o in (mine, its))
        surer = q if max(q) > max(p) else p
        edges = by_hand.at((its if max(q) > max(p) else mine).box_deltas, cell)
        bins = [edges[5 * side : 5 * side + 5] for side in range(4)]
        far = [sum(i * v for i, v in enumerate(by_hand.softmax(b))) * stride for b in bins]
        box = [max(0, x - far[0]), max(0, y - far[1]), min(width, x + far[2]), min(height, y + far[3])]
        if x < width and y < height and min(box[2] - box[0], box[3] - box[1]) >= 1:
            gap = max(abs(a - b) for a, b in zip(p, q, strict=True))
            found[image].append((gap, box, surer.index(max(surer))))
    kept: list[list[tuple[list[float], int]]] = [[], []]
    for image in range(2):
        for _, box, label in sorted(found[image], key=lambda one: -one[0]):
            if len(kept[image]) < most and all(by_hand.iou(box, other) <= 0.3 for other, _ in kept[image]):
                kept[image].append((box, label))
    return kept, mine, its, batch


def test_instances_are_where_the_heads_disagree_most() -> None:
    wanted, mine, its, batch = chosen()
    read = fake.FakeDetector().answers
    found = instances(read(mine, batch), read(its, batch), batch.geometry, overlap=0.3, most=4)
    for boxes, labels, image in zip(found.boxes, found.labels, wanted, strict=True):
        assert labels.tolist() == [label for _, label in image]
        torch.testing.assert_close(boxes, torch.tensor([box for box, _ in image]), rtol=1e-4, atol=1e-3)
    assert found.image.tolist() == [0] * len(wanted[0]) + [1] * len(wanted[1])
    same = instances(read(mine, batch), read(mine, batch), batch.geometry, overlap=0.3, most=4)
    assert [len(b) for b in same.boxes] == [0, 0], "heads that agree have no instances"


def test_a_regions_instance_is_the_surer_heads_box_of_its_class() -> None:
    detector, mine, its, batch = regions()
    assert mine.roi_logits is not None
    assert its.roi_logits is not None
    quiet, loud = torch.zeros(3, 4), torch.zeros(3, 4)
    quiet[:, 0], loud[:, 2] = 6.0, 6.0  # background; class 1
    mine, its = replace(mine, roi_logits=quiet), replace(its, roi_logits=loud)
    found = instances(detector.answers(mine, batch), detector.answers(its, batch), batch.geometry, 0.3, 10)
    assert torch.cat(found.labels).tolist() == [1, 1, 1]
    assert its.roi_deltas is not None
    codes = its.roi_deltas.unflatten(1, (-1, 4))[:, 2]
    boxes = detector.region_coder.decode_single(codes, torch.cat(its.proposals)).clamp(0, 128)
    order = [[b.tolist() for b in boxes[:2]], [boxes[2].tolist()]]
    for mine_boxes, wanted in zip(found.boxes, order, strict=True):
        torch.testing.assert_close(torch.tensor(sorted(mine_boxes.tolist())), torch.tensor(sorted(wanted)))


def test_every_term() -> None:
    kept, mine, its, batch = chosen()
    student, teacher, _ = scene()
    detector = fake.FakeDetector()
    found = fake.run(gid.Loss(gid.Config(instances=4, size=2), fake.pair()), student, teacher, batch, detector)
    features = [_pooled(taps.pyramid, kept) for taps in (student, teacher)]
    feat = relation = cls = box = 0.0
    for image in range(2):
        s, t = (f[image] for f in features)
        count = len(s)
        assert count >= 3
        feat += sum(float((a - b).square().sum()) / 4 for a, b in zip(s, t, strict=True)) / count
        relation += _relation(s, t)
        boxes = [torch.tensor([b for b, _ in image]) for image in kept]
        labels = [torch.tensor([c for _, c in image]) for image in kept]
        near = detector.answers(mine, replace(batch, boxes=tuple(boxes), labels=tuple(labels))).positive.tolist()
        there = [c for place, c in enumerate(by_hand.cells(mine.class_logits)) if near[place] and c[0] == image]
        for cell in there:
            pairs = zip(by_hand.at(its.class_logits, cell), by_hand.at(mine.class_logits, cell), strict=True)
            cls += sum(by_hand.coin(a, b) for a, b in pairs) / len(there)
            far = [_means(by_hand.at(o.box_deltas, cell)) for o in (mine, its)]
            box += sum(abs(a - b) for a, b in zip(*far, strict=True)) / len(there)
    assert found["feat"].item() == pytest.approx(5e-4 * feat / 2, rel=1e-4)
    assert found["relation"].item() == pytest.approx(40 * relation / 2, rel=1e-4)
    assert found["cls"].item() == pytest.approx(0.1 * cls / 2, rel=1e-4)
    assert found["box"].item() == pytest.approx(box / 2, rel=1e-4)


def _means(edges: list[float]) -> list[float]:
    sides = [by_hand.softmax(edges[5 * side : 5 * side + 5]) for side in range(4)]
    return [sum(i * p for i, p in enumerate(side)) for side in sides]


def _pooled(pyramid: tuple[Tensor, ...], kept: list[list[tuple[list[float], int]]]) -> list[list[Tensor]]:
    """Box by box: torchvision's RoIAlign on the level that FPN's eq. 1 names, in float64."""
    found: list[list[Tensor]] = []
    for image, boxes in enumerate(kept):
        found.append([])
        for box, _ in boxes:
            level = min(2, max(0, math.floor(4 + math.log2(math.sqrt(by_hand.area(box)) / 224 + 1e-6)) - 3))
            x, where = pyramid[level][image : image + 1].double(), [torch.tensor([box]).double()]
            found[-1].append(roi_align(x, where, 2, 1 / fake.STRIDES[level], sampling_ratio=2)[0])
    return found


def _relation(student: list[Tensor], teacher: list[Tensor]) -> float:
    pairs = [(i, j) for i in range(len(student)) for j in range(len(student)) if i != j]
    apart = [{(i, j): float((f[i] - f[j]).norm()) for i, j in pairs} for f in (student, teacher)]
    mean = [sum(a.values()) / len(pairs) for a in apart]
    return sum(by_hand.smooth_l1(apart[0][p] / mean[0], apart[1][p] / mean[1]) for p in pairs) / len(pairs)


def test_relations_of_fewer_than_three_do_not_count_and_equal_ones_are_finite() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    image = torch.tensor([0, 0, 1, 1, 1, 1, 3])
    other = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = relation_error(features, other, image, 4)
    assert (found > 0).tolist() == [False, True, False, False]
    rows = [f[2:6].detach().double() for f in (features, other)]
    assert found[1].item() == pytest.approx(_relation(list(rows[0]), list(rows[1])), rel=1e-5)
    twins = torch.zeros(3, 5, requires_grad=True)
    relation_error(twins, other[:3], torch.zeros(3, dtype=torch.int64), 1).sum().backward()
    assert twins.grad is not None
    assert twins.grad.isfinite().all()
    assert relation_error(features[:0], other[:0], image[:0], 2).tolist() == [0, 0]


def test_of_regions_it_compares_the_box_of_the_instances_class() -> None:
    detector, mine, its, batch = regions()
    method = gid.Loss(gid.Config(feature=0, relation=0), fake.pair(detector.shapes, detector.shapes))
    pyramid = tuple(torch.zeros(2, 16, 128 // s, 128 // s) for s in detector.shapes.strides)
    taps = Taps(None, pyramid)
    assert mine.roi_deltas is not None
    its = replace(its, roi_deltas=mine.roi_deltas + 0.25)
    found = method.losses(taps, mine, taps, batch, Advice(detector, ask=lambda: its))
    read = detector.answers
    these = instances(read(mine, batch), read(its, batch), batch.geometry, 0.3, 10)
    near = read(mine, replace(batch, boxes=these.boxes, labels=these.labels))
    images = {int(i) for i in near.image[near.positive]}
    assert images, "some region must answer for an instance"
    assert found["box"].item() == pytest.approx(4 * 0.25 * len(images) / 2, rel=1e-5)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="nms in"):
        gid.Config(nms=0)
    with pytest.raises(ValueError, match="gid compares"):
        gid.Loss(gid.Config(), fake.pair(teacher=replace(fake.SHAPES, places=("other",))))
