"""What a head says place by place: the same places, boxes and shares that the detector's own losses use."""

from types import ModuleType
from typing import Any

import pytest
import torch

from kd.blocks import distribution
from kd.blocks.anchor_coding import AnchorCoding
from kd.blocks.anchors import AnchorShapes
from kd.detectors import fcos, retinanet
from tests.kd import by_hand, perfect
from tests.kd.detecting import CLASSES, SOME, batch, counted, detector, every_detector, every_one_stage, outputs_of

TINY = [[[3.0, 3, 4, 4]], [[127.0, 127, 128, 128]]]


@every_detector
@pytest.mark.parametrize(
    "boxes", [SOME, [[], []], [[[3.0, 3, 4, 4]], [[127.0, 127, 128, 128]]]], ids=["some", "no", "1px"]
)
def test_answers_are_of_all_places_and_name_the_box_that_each_answers_for(module: ModuleType, boxes: Any) -> None:
    d = detector(module)
    b = counted(d, batch(boxes))
    outputs = outputs_of(d, b)
    found = d.answers(outputs, b)
    count = len(found.image)
    assert found.places.shape == (count, 4)
    assert found.logits.shape == (count, CLASSES + found.regions)
    assert found.scores.shape == (count, CLASSES)
    assert found.image.tolist() == sorted(found.image.tolist())
    truth = torch.cat(b.boxes)
    for place in found.positive.nonzero()[:, 0].tolist():
        box = int(found.truth[place])
        assert found.label[place] == torch.cat(b.labels)[box]
        owner = 0 if box < len(b.boxes[0]) else 1
        assert found.image[place] == owner
        if found.regions:
            assert by_hand.iou(found.places[place].tolist(), truth[box].tolist()) >= 0.5
    assert (found.label[~found.positive] == -1).all()
    if not found.regions:
        assert found.positive.sum() == b.totals["positives"]
        assert count == len(b) * sum(found.lengths)
        assert found.share == 1 / max(1.0, float(b.totals["positives"]))


@every_detector
def test_the_code_of_a_perfect_answer_decodes_to_its_box(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch(SOME))
    found = d.answers(perfect.outputs(d, b), b)
    assert found.positive.any()
    boxes = found.decode(found.code_of(found.label))[found.positive]
    torch.testing.assert_close(boxes, torch.cat(b.boxes)[found.truth[found.positive]], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("far", [0.0, 2.0, 2.25, 3.999, 4.0, 9.0, -1.0])
def test_distribution_focal_loss_is_the_cross_entropy_of_the_two_bins_beside(far: float) -> None:
    edges = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    found = distribution.focal(edges, torch.full((1, 4), far))
    for side in range(4):
        p, y = by_hand.softmax(edges[0, side].double().tolist()), min(max(far, 0.0), 4.0)
        left = min(int(y), 3)
        log_left, log_right = (-torch.tensor(p[i]).double().log().item() for i in (left, left + 1))
        assert found[0, side].item() == pytest.approx((left + 1 - y) * log_left + (y - left) * log_right, abs=1e-5)


def test_the_number_of_a_distribution_is_its_mean() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    numbers, edges = distribution.sides(logits)
    assert edges is not None
    for row in range(3):
        for side in range(4):
            p = by_hand.softmax(logits[row, 5 * side : 5 * side + 5].double().tolist())
            assert numbers[row, side].item() == pytest.approx(sum(i * x for i, x in enumerate(p)), rel=1e-5)
    plain = torch.randn(3, 4)
    assert distribution.sides(plain)[0] is plain
    assert distribution.sides(plain)[1] is None


@pytest.mark.parametrize("distances", [False, True])
def test_anchor_codes_decode_to_what_was_encoded(distances: bool) -> None:
    anchors = AnchorShapes(sizes=(4.0, 6.0), ratios=(0.5, 2.0)).on((64, 96), (8, 16), torch.device("cpu"))
    index = torch.tensor([0, 7, len(anchors.boxes) - 1])
    boxes = torch.tensor([[1.0, 2, 30, 50], [9.5, 9, 10, 10], [0, 0, 96, 64]])
    coding = AnchorCoding(distances)
    torch.testing.assert_close(coding.decode(coding.encode(boxes, anchors, index), anchors, index), boxes)
    if distances:  # in strides of the level: 8 at first, 16 at last
        x, y = by_hand.middle(anchors.boxes[-1].tolist())
        assert coding.encode(boxes, anchors, index)[2].tolist() == pytest.approx(
            [x / 16, y / 16, (96 - x) / 16, (64 - y) / 16]
        )


@every_one_stage
@pytest.mark.parametrize("boxes", [SOME, [[], []], [[[3.0, 3, 4, 4]], [[0.0, 0, 128, 128]]]], ids=["some", "no", "odd"])
def test_boxes_as_distributions_learn_and_detect(module: ModuleType, boxes: Any) -> None:
    d = detector(module, bins=8)
    b = counted(d, batch(boxes))
    outputs = outputs_of(d, b)
    assert outputs.box_deltas[0].shape[1] % (4 * 9) == 0
    losses = d.task_losses(outputs, b)
    torch.stack(list(losses.values())).sum().backward()
    assert "dfl" in losses
    assert all(x.isfinite() for x in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in d.parameters())
    last = dict(d.named_parameters())["head.regression_head.bbox_reg.weight"].grad
    assert last is not None
    assert (last.abs().max() > 0) == bool(len(torch.cat(b.boxes)))
    assert d.answers(outputs, b).edges.shape[1:] == (4, 9)  # pyright: ignore
    d.detect(outputs, b.geometry)
    assert "dfl" not in detector(module).task_losses(outputs_of(detector(module), b), b)


@every_one_stage
def test_the_sides_of_a_distribution_are_strides_from_the_middle(module: ModuleType) -> None:
    d = detector(module, bins=16)
    b = counted(d, batch([[[20.0, 24, 61, 50]]]))
    found = d.answers(outputs_of(d, b), b)
    place = int(found.positive.nonzero()[0, 0])
    strides = [s for s, count in zip(d.shapes.strides, found.lengths, strict=True) for _ in range(count)]
    x, y = by_hand.middle(found.places[place].tolist())
    code = found.code_of(found.label).clone()
    code[place] = torch.tensor([x - 20, y - 24, 61 - x, 50 - y]) / strides[place]
    torch.testing.assert_close(found.decode(code)[place], b.boxes[0][0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("module", [fcos, retinanet])
def test_bins_are_checked_and_part_of_what_the_answers_are(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        module.Config(bins=1)
    one, other = detector(module, bins=8), detector(module)
    assert (one.shapes.bins, other.shapes.bins) == (8, None)
    assert one.shapes.places != other.shapes.places
