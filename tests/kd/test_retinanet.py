"""RetinaNet alone: torchvision's numbers, its anchors, its matching, its own settings."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from data_sharding.batch import Outputs
from kd.backbones import resnet
from kd.blocks.anchors import AnchorShapes, under_any
from kd.blocks.match import BACKGROUND, BETWEEN, match_all
from kd.detectors import retinanet
from tests.kd.detecting import batch, counted, seen_by

FIRST: dict[str, Any] = {"top": "p5", "head_norm": "none", "box_loss": "l1"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these maps are too small to share
    yield
    torch.set_num_threads(threads)


def torchvisions(version: int) -> tuple[Any, retinanet.RetinaNet]:
    make = retinanet_resnet50_fpn if version == 1 else retinanet_resnet50_fpn_v2
    theirs: Any = make(weights=None, weights_backbone=None, num_classes=5).eval()
    # A spread in the logits, so that some scores pass and rounding of the random network does not.
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)
    theirs.head.classification_head.cls_logits.bias.data.fill_(-2)
    settings = FIRST if version == 1 else {}
    config = retinanet.Config(backbone=resnet.Config(depth=50, norm="batch"), score_threshold=0.2, **settings)
    ours = retinanet.build(config, 5, weights_follow=True)
    keys = ours.load_state_dict(retinanet.from_torchvision(theirs.state_dict()), strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith("num_batches_tracked") for k in keys.missing_keys)
    return theirs, ours.eval()


@pytest.mark.parametrize("version", [1, 2])
def test_with_torchvisions_weights_it_is_torchvisions_detector(version: int) -> None:
    """Head outputs, losses of one image, and detections."""
    theirs, ours = torchvisions(version)
    b = batch([[[10.0, 12, 47.3, 50], [60.2, 60, 90, 75.5], [3.1, 20, 120, 111]]])
    images = ours.normalise(b.images, b.geometry)
    with torch.no_grad():
        pyramid = list(theirs.backbone(images).values())
        wanted = theirs.head(pyramid)
        anchors = theirs.anchor_generator(ImageList(images, [(128, 128)]), pyramid)
        outputs = ours.predict(ours.features(images).pyramid, b.geometry)
        found = ours._anchors(b.geometry)
        logits, codes = ours._flat(outputs, found)
        torch.testing.assert_close(found.boxes, anchors[0])
        torch.testing.assert_close(logits, wanted["cls_logits"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(codes, wanted["bbox_regression"], rtol=1e-3, atol=1e-4)
        targets = [{"boxes": b.boxes[0], "labels": b.labels[0]}]
        losses, theirs_losses = (
            ours.task_losses(outputs, counted(ours, b)),
            theirs.compute_loss(targets, wanted, anchors),
        )
        torch.testing.assert_close(losses["cls"], theirs_losses["classification"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["box"], theirs_losses["bbox_regression"], rtol=1e-4, atol=1e-5)
        split = {"cls_logits": logits, "bbox_regression": codes}
        split = {name: list(x.split(found.lengths, dim=1)) for name, x in split.items()}
        theirs.score_thresh = 0.2
        expected = theirs.postprocess_detections(split, [list(found.boxes.split(found.lengths))], [(128, 128)])[0]
        detections = ours.detect(outputs, b.geometry)[0]
    some = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1)  # torchvision also keeps boxes without area
    count = int(some.sum())
    assert 20 < count <= len(detections.scores)
    torch.testing.assert_close(detections.scores[:count], expected["scores"][some])
    torch.testing.assert_close(detections.boxes[:count], expected["boxes"][some])
    assert torch.equal(detections.labels[:count], expected["labels"][some])


def test_small_anchors_on_fine_levels_are_exact_where_asked() -> None:
    rounded, exact = (AnchorShapes(sizes=(1.1,), ratios=(0.5, 2.0), whole_pixels=w) for w in (True, False))
    areas = [(a.on((8, 8), (4,), CPU).boxes.diff(dim=0)) for a in (rounded, exact)]
    boxes = exact.on((8, 8), (4,), CPU).boxes
    assert areas[0].shape == areas[1].shape == (7, 4)
    torch.testing.assert_close((boxes[:, 2:] - boxes[:, :2]).prod(1), torch.full((8,), 4.4**2), rtol=2e-3, atol=0)
    assert (rounded.on((8, 8), (4,), CPU).boxes % 1 == 0).all()


def test_anchors_of_odd_canvases_stand_at_their_strides() -> None:
    found = AnchorShapes(sizes=(4.0,), ratios=(1.0,)).on((65, 97), (8, 16), CPU)
    assert found.shapes == ((9, 13), (5, 7))
    assert found.lengths == [117, 35]
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    assert centres[:117].amax(0).tolist() == [96.0, 64.0]
    assert centres[117:].amax(0).tolist() == [96.0, 64.0]


ANCHORS = torch.tensor([[0.0, 0, 8, 8], [8.0, 0, 16, 8], [0.0, 8, 8, 16], [8.0, 8, 16, 16]])
ALL = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("boxes", "allowed", "expected"),
    [
        ([], ALL, [BACKGROUND] * 4),
        ([[0.0, 0, 8, 8]], ALL, [0, BACKGROUND, BACKGROUND, BACKGROUND]),
        ([[0.0, 0, 8, 15]], ALL, [0, BACKGROUND, BETWEEN, BACKGROUND]),
        ([[1.0, 1, 2, 2]], ALL, [0, BACKGROUND, BACKGROUND, BACKGROUND]),  # too small for any threshold
        ([[8.0, 0, 16, 8]], torch.tensor([[True, False, True, True]]), [0, BACKGROUND, BACKGROUND, BACKGROUND]),
        ([[20.0, 20, 21, 21]], ALL, [BACKGROUND, BACKGROUND, BACKGROUND, 0]),  # under no anchor: the nearest
        ([[20.0, 20, 21, 21], [8.0, 8, 16, 16]], ALL, [BACKGROUND, BACKGROUND, BACKGROUND, 1]),
    ],
)  # fmt: skip
def test_matching_by_hand(boxes: list[list[float]], allowed: torch.Tensor, expected: list[int]) -> None:
    found = match_all([torch.tensor(boxes).reshape(-1, 4)], ANCHORS, allowed, 0.5, 0.4)
    assert found.tolist() == [expected]


def test_matches_count_through_the_boxes_of_all_images() -> None:
    one = torch.tensor([[0.0, 0, 8, 8]])
    found = match_all([one, one[:0], torch.cat([one, one + 8])], ANCHORS, ALL.expand(3, 4), 0.5, 0.4)
    assert found.tolist() == [[0, -1, -1, -1], [-1] * 4, [1, -1, -1, 2]]


def test_what_lies_under_a_region() -> None:
    regions = torch.tensor([[0.0, 0, 5, 5], [7.0, 8, 16, 16]])
    assert under_any(ANCHORS, regions, 0.4).tolist() == [True, False, False, True]
    assert under_any(ANCHORS, regions[:0], 0.4).tolist() == [False] * 4


@pytest.mark.parametrize(
    "setting",
    [{"negative_iou": 0.6}, {"anchor_sizes": ()}, {"anchor_ratios": (0.0,)}],
    ids=str,
)
def test_its_own_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        retinanet.Config(**setting)


def test_box_codes_too_large_to_be_meant_stay_finite() -> None:
    ours = retinanet.build(retinanet.Config(width=8, head_depth=0), 2)
    b = batch([[]])
    outputs = seen_by(ours, b)
    wild = Outputs(tuple(m + 9 for m in outputs.class_logits), tuple(m + 1e4 for m in outputs.box_deltas))
    assert all(one.boxes.isfinite().all() for one in ours.detect(wild, b.geometry))
