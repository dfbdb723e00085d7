"""torchvision's detectors load into ours and stay the same function; other files are refused by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from data_sharding.batch import Geometry
from kd import checkpoint
from kd.class_rows import choose
from kd.detectors.base import Detector
from kd.foreign import TOOLS, read
from tests.kd.detecting import batch, detector, every_detector, seen_by

CLASSES = ("zebra", "person", "stop sign")
"""Of COCO, out of order: 24, 1 and 13 are their category ids."""
COCO_IDS = (24, 1, 13)
SPREADS = (
    ("head.classification_head.cls_logits", 0.05, -2.0),
    ("rpn.head.cls_logits", 0.5, 0.0),
    ("roi_heads.box_predictor.cls_score", 0.01, 0.0),
)
"""Last layers, and mean and deviation of their weights."""
LEAST = {"head": 0.05, "roi_heads": 0.005}
"""Score thresholds: 91 random classes share a probability of 1."""
SIDE = {"min_size": 128, "max_size": 128}


def backbone(top: Any, norm: Any = nn.BatchNorm2d) -> nn.Module:
    layers = [2, 3, 4] if top is not None else None
    made = resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=layers, extra_blocks=top)
    return made if norm is None else _untrivial(made)


def _untrivial(module: nn.Module) -> nn.Module:
    """Statistics and scales that a mistake in them would show."""
    for part in module.modules():
        if hasattr(part, "running_var"):
            size = part.weight.shape  # pyright: ignore
            part.weight.data = 0.6 + 0.4 * torch.rand(size)  # pyright: ignore
            part.bias.data, part.running_mean.data = torch.randn(size) / 9, torch.randn(size) / 9  # pyright: ignore
            part.running_var.data = 0.5 + torch.rand(size)  # pyright: ignore
    return module


def fcos_() -> Any:
    return FCOS(backbone(LastLevelP6P7(256, 256)), 91, **SIDE, score_thresh=0.05)


def retinanet_1() -> Any:
    made = RetinaNet(backbone(LastLevelP6P7(256, 256)), 91, anchor_generator=_default_anchorgen(), **SIDE)
    overwrite_eps(made, 0.0)
    return made


def retinanet_2() -> Any:
    head = RetinaNetHead(256, 9, 91, norm_layer=lambda c: nn.GroupNorm(32, c))
    return RetinaNet(backbone(LastLevelP6P7(512, 256)), 91, anchor_generator=_default_anchorgen(), head=head, **SIDE)


def faster_rcnn_1() -> Any:
    made = FasterRCNN(backbone(None), 91, **SIDE)
    overwrite_eps(made, 0.0)
    return made


def faster_rcnn_2() -> Any:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.resnet import resnet18

    body = _resnet_fpn_extractor(resnet18(weights=None), 5, norm_layer=nn.BatchNorm2d)
    box_head = FastRCNNConvFCHead((256, 7, 7), [256, 256], [1024], norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    rpn = RPNHead(256, 3, conv_depth=2)
    made = FasterRCNN(body, 91, rpn_anchor_generator=anchors, rpn_head=rpn, box_head=box_head, **SIDE)
    return _untrivial(made)


MAKERS: dict[str, Callable[[], Any]] = {
    "fcos": fcos_,
    "retinanet": retinanet_1,
    "retinanet v2": retinanet_2,
    "faster_rcnn": faster_rcnn_1,
    "faster_rcnn v2": faster_rcnn_2,
}


def made(kind: str) -> Any:
    """torchvision's, with logits spread so that detections do not hang on rounding."""
    torch.manual_seed(0)
    found = MAKERS[kind]().eval()
    for name, spread, middle in SPREADS:
        layer = dict(found.named_modules()).get(name)
        if layer is not None:
            nn.init.normal_(layer.weight, std=spread)
            nn.init.normal_(layer.bias, middle)
    # All candidates, all detections: which classes are asked for then changes nothing for the others.
    for owner in (found, getattr(found, "roi_heads", found)):
        owner.detections_per_img = 100_000
        owner.score_thresh = LEAST["roi_heads" if hasattr(found, "roi_heads") else "head"]
    found.topk_candidates = 10**6
    return found


def without_limits(ours: Any) -> None:
    two_stages = ours.shapes.family == "two_stage"
    threshold = LEAST["roi_heads" if two_stages else "head"]
    candidates = ours.config.candidates if two_stages else 10**6
    ours.config = replace(ours.config, detections=100_000, score_threshold=threshold, candidates=candidates)


@pytest.mark.parametrize("name", MAKERS)
def test_detections_are_torchvisions_own_for_the_classes_asked_for(name: str, tmp_path: Path) -> None:
    """Their whole forward, transform and all, against ours on the same pixels."""
    theirs = made(name)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, config = checkpoint.load(tmp_path / "theirs.pth", CLASSES, {})
    assert config.name == name.split()[0]
    assert ours.shapes.num_classes == 3
    assert not ours.training
    without_limits(ours)
    b = batch([[]])
    with torch.no_grad():
        wanted = theirs([b.images[0].float() / 255])[0]
        found = ours.detect(seen_by(ours, b), b.geometry)[0]
    compared = 0
    for label, coco in enumerate(COCO_IDS):
        one, other = wanted["labels"] == coco, found.labels == label
        area = (wanted["boxes"][one][:, 2:] > wanted["boxes"][one][:, :2]).all(1)
        compared += int(other.sum())
        torch.testing.assert_close(found.scores[other], wanted["scores"][one][area], rtol=1e-3, atol=1e-4)
        if not len(found.boxes[other]):
            continue
        # Nearly equal scores may stand in another order.
        apart = (found.boxes[other][:, None] - wanted["boxes"][one][area][None]).abs().amax(-1)
        assert apart.amin(0).max() < 0.05
        assert apart.amin(1).max() < 0.05
    assert compared > 10


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_files_of_older_versions_load_alike(name: str, tmp_path: Path) -> None:
    """The official files have the names of their time: no `.0` behind single convolutions."""
    state = made(name).state_dict()
    old = {_old_name(key): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(state, tmp_path / "new.pth")
    torch.save({"model": old, "epoch": 3}, tmp_path / "old.pth")
    new, old_one = (checkpoint.load(tmp_path / f"{age}.pth", CLASSES, {})[0] for age in ("new", "old"))
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old_one.state_dict().values(), strict=True))


def _old_name(key: str) -> str:
    key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
    key = re.sub(r"(rpn\.head\.conv)\.0\.0\.", r"\1.", key)
    return re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)


@every_detector
def test_keeping_classes_keeps_their_answers(module: Any) -> None:
    whole, some = (detector(module).eval() for _ in range(2))
    some.load_state_dict(whole.state_dict())
    some.keep_classes([2, 0])
    assert some.shapes.num_classes == 2
    b = batch([[]])
    with torch.no_grad():
        one, two = (d.detect(_loud(seen_by(d, b)), b.geometry)[0] for d in (whole, some))
    assert len(two.labels) > 3
    for new, old in enumerate([2, 0]):
        mine, theirs = two.scores[two.labels == new], one.scores[one.labels == old]
        count = min(len(mine), len(theirs), 5)
        torch.testing.assert_close(mine[:count], theirs[:count])
    with pytest.raises(ValueError, match=r"some of 0\.\.1, got \[2\]"):
        some.keep_classes([2])


def _loud(outputs: Any) -> Any:
    if outputs.roi_logits is not None:
        return outputs
    return replace(outputs, class_logits=tuple(m + 4 for m in outputs.class_logits))


@pytest.mark.parametrize(
    ("renamed", "known", "expected"),
    [
        ({}, ("b", "a", "c"), [1, 0]),
        ({"a": "c"}, ("b", "a", "c"), [2, 0]),
        ({"a": 2}, ("b", "a", "c"), [2, 0]),
        ({"a": 0, "b": 2}, None, [0, 2]),
        ({}, None, "3 outputs and no class names in it; say which output is which class: classes: {a: NUMBER"),
        ({"a": 3}, ("b", "a", "c"), "does not know 3"),
        ({}, ("b", "aa", "c"), r"does not know 'a' \(did you mean 'aa'\?\); say what it calls them: classes: {a: ITS"),
        ({"x": "b"}, ("b", "a", "c"), r"x are none of the data set's classes \(a, b\)"),
        ({"a": "b"}, ("b", "a", "c"), "a, b would share one output"),
    ],
)
def test_rows_of_classes(renamed: dict[str, str | int], known: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert choose(("a", "b"), renamed, known, 3, "it") == expected
        return
    with pytest.raises(ValueError, match=expected):
        choose(("a", "b"), renamed, known, 3, "it")


FOREIGN = {
    "Ultralytics (YOLO)": ["model.0.conv.weight", "model.22.dfl.conv.weight"],
    "YOLOX": ["backbone.backbone.stem.conv.conv.weight", "head.cls_preds.0.weight"],
    "MMDetection": ["backbone.conv1.weight", "neck.fpn_convs.0.conv.weight", "bbox_head.retina_cls.weight"],
    "Detectron2": ["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_predictor.cls_score.weight"],
    "a DETR (DETR, DINO, RT-DETR, Hugging Face's)": ["transformer.encoder.layers.0.norm1.weight", "query_embed.weight"],
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_other_tools_are_refused_by_name(tool: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: torch.zeros(2) for name in FOREIGN[tool]}}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth was written by") as told:
        checkpoint.load(tmp_path / "foreign.pth", CLASSES, {})
    assert tool in str(told.value)
    assert "Train one of these" in str(told.value)
    assert tool in TOOLS


class Pickled:
    """Stands for a model that was pickled whole, as Ultralytics does it."""

    def __reduce__(self) -> Any:
        raise AssertionError("only its name is written below")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be used"),
        (b"no weights at all", "cannot be used"),
        (b"cultralytics.nn.tasks\nDetectionModel\n)R.", "Ultralytics"),
    ],
)
def test_what_is_no_state_dict_is_never_executed(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "odd.pt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "odd.pt")


def test_a_missing_file_and_masks_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere.pth")
    state = made("faster_rcnn").state_dict() | {"roi_heads.mask_predictor.conv5_mask.bias": torch.ones(1)}
    torch.save(state, tmp_path / "mask.pth")
    with pytest.raises(ValueError, match="Mask or Keypoint R-CNN"):
        checkpoint.load(tmp_path / "mask.pth", CLASSES, {})


def test_geometry_is_ours(tmp_path: Path) -> None:
    """A loaded teacher looks at padded canvases like any detector."""
    torch.save(made("fcos").state_dict(), tmp_path / "theirs.pth")
    ours: Detector = checkpoint.load(tmp_path / "theirs.pth", CLASSES, {"zebra": "horse"})[0]
    b = batch([[]], geometry=Geometry((128, 128), torch.tensor([[64, 96]])))
    with torch.no_grad():
        found = ours.detect(seen_by(ours, b), b.geometry)[0]
    assert (found.boxes[:, 2] <= 96).all()
