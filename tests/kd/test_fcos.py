"""FCOS alone: torchvision's numbers and its own settings. What holds for every detector is in test_detectors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torchvision.models.detection import fcos_resnet50_fpn

from kd.backbones import resnet
from kd.detectors import fcos
from tests.kd.detecting import batch, counted, outputs_of


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these maps are too small to share
    yield
    torch.set_num_threads(threads)


def torchvisions() -> tuple[Any, fcos.FCOS]:
    theirs: Any = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    config = fcos.Config(backbone=resnet.Config(depth=50, norm="batch"), nearest=False, score_threshold=0.2)
    ours = fcos.build(config, 5, weights_follow=True)
    # A spread in the logits, so that some scores pass and rounding of the random network does not.
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)
    theirs.head.classification_head.cls_logits.bias.data.fill_(-2)
    keys = ours.load_state_dict(fcos.from_torchvision(theirs.state_dict()), strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith("num_batches_tracked") for k in keys.missing_keys)
    return theirs, ours.eval()


def test_with_torchvisions_weights_it_is_torchvisions_detector() -> None:
    theirs, ours = torchvisions()
    b = batch([[[10.0, 12, 47.3, 50], [60.2, 60, 90, 75.5], [3.1, 20, 120, 111]], []])
    images = ours.normalise(b.images, b.geometry)
    with torch.no_grad():
        pyramid = list(theirs.backbone(images).values())
        wanted = theirs.head(pyramid)
        outputs = ours.predict(ours.features(images).pyramid, b.geometry)
        points = ours._points(b.geometry)
        for found, key in zip(
            fcos._flat(outputs, points), ("cls_logits", "bbox_regression", "bbox_ctrness"), strict=True
        ):
            torch.testing.assert_close(found, wanted[key].reshape(found.shape), rtol=1e-3, atol=1e-4)
        anchors = torch.cat([points.xy - points.stride[:, None] / 2, points.xy + points.stride[:, None] / 2], dim=1)
        targets = [{"boxes": x, "labels": y} for x, y in zip(b.boxes, b.labels, strict=True)]
        cells = [h * w for h, w in points.shapes]
        theirs_losses = theirs.compute_loss(targets, wanted, [anchors, anchors], cells)
        losses = ours.task_losses(outputs, counted(ours, b))
    for name, key in (("cls", "classification"), ("box", "bbox_regression"), ("centerness", "bbox_ctrness")):
        torch.testing.assert_close(losses[name], theirs_losses[key], rtol=1e-4, atol=1e-5)


def test_detections_are_torchvisions() -> None:
    theirs, ours = torchvisions()
    b = batch([[], []])
    with torch.no_grad():
        outputs = outputs_of(ours, b)
        points = ours._points(b.geometry)
        logits, distances, centerness = fcos._flat(outputs, points)
        cells = [h * w for h, w in points.shapes]
        flat = {"cls_logits": logits, "bbox_regression": distances + 0.5, "bbox_ctrness": centerness[..., None]}
        flat = {k: list(v.split(cells, dim=1)) for k, v in flat.items()}
        anchors = torch.cat([points.xy - points.stride[:, None] / 2, points.xy + points.stride[:, None] / 2], dim=1)
        wanted = theirs.postprocess_detections(flat, [list(anchors.split(cells))] * 2, [(128, 128)] * 2)
        found = ours.detect(replace(outputs, box_deltas=tuple(x + 0.5 for x in outputs.box_deltas)), b.geometry)
    for ours_one, theirs_one in zip(found, wanted, strict=True):
        assert len(ours_one.scores) > 20
        torch.testing.assert_close(ours_one.scores, theirs_one["scores"])
        torch.testing.assert_close(ours_one.boxes, theirs_one["boxes"])
        assert torch.equal(ours_one.labels, theirs_one["labels"])


@pytest.mark.parametrize("setting", [{"center_radius": 0.0}, {"point_offset": 1.5}], ids=str)
def test_its_own_settings_are_checked(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        fcos.Config(**setting)  # pyright: ignore[reportArgumentType]
