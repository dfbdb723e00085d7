"""A detector that you already have: a checkpoint of torchvision's FCOS, RetinaNet or Faster R-CNN becomes one of ours.

Everything is read off the file: the family, the backbone's depth, widths and levels, the number of classes. What a file
does not say is taken to be as in torchvision's own models: anchors, pixel statistics (ImageNet's), and, for a file with
COCO's 91 outputs, what they are called. Other tools' files are refused by the tool's name (`kd.foreign`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kd.backbones import resnet
from kd.class_rows import choose
from kd.detectors import faster_rcnn, fcos, retinanet
from kd.detectors.base import Detector
from kd.foreign import read, refusal
from kd.plugins import plugin

COCO_OUTPUTS = 91
"""torchvision's COCO models number their outputs by COCO's category ids; 0 is the background."""
_EPSILON = 1e-5
_PER_CELL = {"fcos": 1, "retinanet": 9, "faster_rcnn": 1}


def load(path: Path, classes: Sequence[str], renamed: Mapping[str, str | int]) -> tuple[Detector, Any]:
    """The detector in a torchvision checkpoint, in eval mode, answering for `classes` in their order, and its Config.

    `renamed`: see `choose`. FileNotFoundError; ValueError for what is not torchvision's, or knows other classes.
    """
    state = read(path)
    kind, config = recognise(state, path)
    module, outputs = plugin("kd.detectors", kind), _outputs(state, kind)
    background = kind == "faster_rcnn"  # is an output of its own there, and no class of ours
    rows = choose(classes, renamed, _names(outputs), outputs, str(path))
    if background and 0 in rows:
        raise ValueError(f"classes: output 0 of {path} is the background; classes count from 1")
    ours = module.from_torchvision(state)
    if outputs == COCO_OUTPUTS and _of_the_first(config):
        ours = _without_epsilon(ours)
    detector = module.build(config, outputs - background, weights_follow=True)
    _load_strictly(detector, ours, path)
    detector.keep_classes([row - background for row in rows])
    return detector.eval(), config


def recognise(state: Mapping[str, Tensor], path: Path) -> tuple[str, Any]:
    """The plug-in and its Config for a state dict of torchvision's names; ValueError with whose it is otherwise."""
    kind = next((kind for kind, name in _HEADS.items() if name in state), None)
    if kind is None or "backbone.body.layer4.0.conv1.weight" not in state:
        raise ValueError(refusal(path, state, "its parameters are not named as torchvision's with a ResNet are"))
    if any(re.search("mask_predictor|keypoint_predictor", name) for name in state):
        raise ValueError(f"{path} is torchvision's Mask or Keypoint R-CNN; boxes are all we learn: give a Faster R-CNN")
    width = _tensors(state, r"backbone\.fpn\.layer_blocks\.0\.")[0].shape[0]
    finest = 6 - len(_tensors(state, r"backbone\.fpn\.layer_blocks\."))
    common = {"backbone": resnet.Config(depth=_depth(state), norm="frozen"), "width": width}
    if kind == "faster_rcnn":
        return kind, faster_rcnn.Config(**common, levels=(*range(finest, 6), 6), **_two_stages(state, path))
    above = len(_tensors(state, r"backbone\.fpn\.extra_blocks\."))
    common |= {"levels": tuple(range(finest, 6 + above))}
    common |= {"head_depth": len(_tensors(state, r"head\.classification_head\.conv\."))}
    if kind == "fcos":
        return kind, fcos.Config(**common)
    return kind, retinanet.Config(**common, **_anchored(state, width, path))


_HEADS = {
    "fcos": "head.regression_head.bbox_ctrness.weight",
    "retinanet": "head.classification_head.cls_logits.weight",
    "faster_rcnn": "roi_heads.box_predictor.cls_score.weight",
}
"""What only this family has; the first that is there."""


def _outputs(state: Mapping[str, Tensor], kind: str) -> int:
    name = _HEADS["retinanet" if kind == "fcos" else kind]
    return len(state[name]) // _PER_CELL[kind]


def _tensors(state: Mapping[str, Tensor], begins: str) -> list[Tensor]:
    """The convolutions' weights below a name."""
    return [v for k, v in state.items() if re.match(begins, k) and k.endswith("weight") and v.ndim == 4]


def _depth(state: Mapping[str, Tensor]) -> Any:
    """Of a ResNet: by its third stage's blocks, and whether they are bottlenecks."""
    blocks = {name.split(".")[3] for name in state if name.startswith("backbone.body.layer3.")}
    bottleneck = "backbone.body.layer3.0.conv3.weight" in state
    return {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101}.get((len(blocks), bottleneck), 50)


def _two_stages(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    if len(state["rpn.head.cls_logits.bias"]) != 3:
        raise ValueError(_unknown_anchors(path, "3 per cell"))
    return {
        "head_depth": len(_tensors(state, r"rpn\.head\.conv\.")),
        "roi_convs": len(_tensors(state, r"roi_heads\.box_head\.")),
        "roi_width": state["roi_heads.box_predictor.cls_score.weight"].shape[1],
    }


def _anchored(state: Mapping[str, Tensor], width: int, path: Path) -> dict[str, Any]:
    if len(state["head.regression_head.bbox_reg.bias"]) != 4 * 9:
        raise ValueError(_unknown_anchors(path, "9 per cell"))
    normed = "head.classification_head.conv.0.1.weight" in state
    from_c5 = any(p6.shape[1] != width for p6 in _tensors(state, r"backbone\.fpn\.extra_blocks\.p6\."))
    first: dict[str, Any] = {"box_loss": "giou" if normed else "l1"}
    return first | {"head_norm": "group" if normed else "none", "top": "c5" if from_c5 else "p5"}


def _unknown_anchors(path: Path, usual: str) -> str:
    return f"{path} has other anchors than torchvision's own models ({usual}), and a file does not say which"


def _names(outputs: int) -> tuple[str, ...] | None:
    """COCO's names from torchvision's own metadata: nothing is downloaded."""
    if outputs != COCO_OUTPUTS:
        return None
    from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

    return tuple(FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


def _of_the_first(config: Any) -> bool:
    """Whether it is a first version that has a second."""
    return getattr(config, "head_norm", "") == "none" or getattr(config, "roi_convs", 1) == 0


def _without_epsilon(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's first RetinaNet and Faster R-CNN on COCO come from a time when frozen normalisers added nothing to
    the variance: so that ours, which adds 1e-5, is the same function, the variances are that much smaller."""
    return {k: v - _EPSILON if k.endswith("running_var") else v for k, v in state.items()}


def _load_strictly(detector: Detector, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = detector.state_dict()
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - state)]
    problems += [f"{name} is not known" for name in sorted(state.keys() - wanted)]
    problems += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        told = "; ".join(problems[:5])
        raise ValueError(f"{path} looks like torchvision's, but is no {type(detector).__name__} of ours: {told}")
    detector.load_state_dict(dict(state))
