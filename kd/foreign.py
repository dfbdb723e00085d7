"""Read a weight file as plain tensors, and say whose it is where it is not ours. Nothing in a file is ever executed."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

TOOLS: Mapping[str, str] = {
    "Ultralytics (YOLO)": r"ultralytics|^(model\.)?model\.\d+\.(conv|cv\d|m|bn|dfl)\.",
    "YOLOv5": r"models\.(yolo|common)\b",
    "YOLOX": r"^backbone\.backbone\.(dark|stem)|^head\.(cls|reg|obj)_preds\.",
    "MMDetection": r"mmdet|mmengine|mmcv|^bbox_head\.|^neck\.|^roi_head\.|^rpn_head\.|^rtm_",
    "Detectron2": r"detectron2|^backbone\.bottom_up\.|^proposal_generator\.|^roi_heads\.box_head\.fc1\.",
    "a DETR (DETR, DINO, RT-DETR, Hugging Face's)":
        r"transformers\.|^(module\.|model\.)*(transformer|encoder|decoder|query_embed|class_embed|input_projection)\b"
        r"|class_labels_classifier",
}  # fmt: skip
"""Tool -> what its parameters' names, or the classes that it pickles, look like; the first that fits is named."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file by name, also where they lie below `model` or `state_dict`.

    FileNotFoundError, or ValueError with the tool that wrote the file where it can be told.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(refusal(path, [str(error)], "more than tensors lies in it, or it is no torch file")) from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        names = map(str, found) if isinstance(found, dict) else ()
        raise ValueError(refusal(path, names, "it is no state dict (tensors by name)"))
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def refusal(path: Path, names: Iterable[str], otherwise: str) -> str:
    """Why a file with these parameter names (or this error text) cannot teach, and what to do instead."""
    names = list(names)
    tool = next((tool for tool, looks in TOOLS.items() if any(re.search(looks, name) for name in names)), None)
    whose = f"was written by {tool}, whose detectors are none of ours" if tool else f"cannot be used: {otherwise}"
    return (
        f"{path} {whose}. A teacher is the `student` folder that a training run ends with, or a state dict of "
        "torchvision's FCOS, RetinaNet or Faster R-CNN with a ResNet. Train one of these with a recipe of your data "
        "(`distill={}`), starting from torchvision's weights where you can"
    )
