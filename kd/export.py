"""A student as one ONNX file that goes from an image's bytes to boxes, and the proof that it does what eager does.

In the graph: the resize to the student's canvas (bit for bit the one of training), padding, standardising, backbone,
pyramid, head, decoding, per-class non-maximum suppression, the cap on detections, and the way back to image pixels.
The image's size is part of the graph: canvas and resize follow from it. One camera, one file.

    image   (h, w, 3) uint8  RGB, upright
    boxes   (n, 4)   float32 x1 y1 x2 y2 in pixels of `image`, best first
    scores  (n,)     float32 in [0, 1]
    labels  (n,)     int64   positions in the metadata's `categories`

torch.export stops at torchvision's `batched_nms`, which branches on the number of boxes (torch 2.15), so the graph is
traced. Tracing follows the same lines of Python that eager runs: nothing is written twice.
"""

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.batch import Geometry
from kd.deploy import Predictor, network
from kd.detectors.base import Detections
from kd.evaluation.coco import to_original
from kd.export_resize import Resize
from kd.student import StudentInfo

OPSET = 17
BOX_TOLERANCE = 1e-3
"""Pixels of the image; in boxes of more than 100 px as many in 100."""
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the file's detections are from eager's, over all images that were compared."""

    images: int
    boxes: int
    box_error: float
    """The largest difference of a coordinate, in image pixels."""
    score_error: float


class Graph(nn.Module):
    """What is written: one image in, tensors out."""

    _sizes: Tensor

    def __init__(self, predictor: Predictor, height: int, width: int) -> None:
        super().__init__()
        self.detector = predictor.detector
        view = predictor.view(height, width)
        self._image, self._valid, self._canvas = (height, width), view.size, view.canvas
        self._resize = Resize((height, width), view.size)
        self.register_buffer("_sizes", torch.tensor([view.size]), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(h, w, 3) uint8 -> boxes (n, 4), scores (n,), labels (n,)."""
        pixels = self._resize(image.permute(2, 0, 1).int()).float()
        padding = (0, self._canvas[1] - self._valid[1], 0, self._canvas[0] - self._valid[0])
        geometry = Geometry(self._canvas, self._sizes)
        found = self.detector.detect(network(self.detector, F.pad(pixels, padding)[None], geometry), geometry)[0]
        there = to_original(found, self._valid, self._image)
        return there.boxes, there.scores, there.labels


def export(predictor: Predictor, info: StudentInfo, images: Sequence[Tensor], path: Path) -> Parity:
    """Write `path` for images of the size of `images` ((3, h, w) uint8, at least one), whose detections it must
    reproduce. Raises ValueError where it does not, or where no image shows anything to compare; then no file is left.
    """
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"one ONNX file takes images of one (height, width); the images given have {sorted(sizes)}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(predictor, info, images[0], part)
        parity = compare(predictor, open_session(part), images)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return parity


def compare(predictor: Predictor, session: Any, images: Sequence[Tensor]) -> Parity:
    """Both find the same boxes in every image; ValueError with the first difference otherwise."""
    boxes, box_error, score_error = 0, 0.0, 0.0
    for number, (image, eager) in enumerate(zip(images, predictor(images), strict=True), start=1):
        try:
            errors = difference(eager, run(session, image))
        except ValueError as error:
            raise ValueError(f"the ONNX graph is not the student, image {number}: {error}") from error
        boxes += len(eager.boxes)
        box_error, score_error = max(box_error, errors[0]), max(score_error, errors[1])
    if not boxes:
        raise ValueError(
            f"the student finds nothing in the {len(images)} image(s), so the ONNX graph cannot be checked; give "
            "images with objects in them, or a lower score threshold"
        )
    return Parity(images=len(images), boxes=boxes, box_error=box_error, score_error=score_error)


def difference(eager: Detections, other: Detections) -> tuple[float, float]:
    """The largest difference in box and score between detections that are the same ones, in whatever order equal
    scores stand. ValueError where they are not."""
    if len(eager.boxes) != len(other.boxes):
        raise ValueError(f"{len(other.boxes)} boxes instead of {len(eager.boxes)}")
    if not len(eager.boxes):
        return 0.0, 0.0
    apart = (eager.boxes[:, None] - other.boxes).abs().amax(2)
    score = (eager.scores[:, None] - other.scores).abs()
    foreign = (eager.labels[:, None] != other.labels) | (score > SCORE_TOLERANCE)
    nearest, partner = apart.masked_fill(foreign, torch.inf).min(1)
    allowed = BOX_TOLERANCE * ((eager.boxes[:, 2:] - eager.boxes[:, :2]).amax(1) / 100).clamp(min=1)
    if (nearest > allowed).any() or len(partner.unique()) != len(partner):
        worst = int((nearest / allowed).argmax())
        raise ValueError(
            f"box {eager.boxes[worst].tolist()} of label {int(eager.labels[worst])} with score "
            f"{float(eager.scores[worst]):.4f} has no fellow of its own within {float(allowed[worst]):g} px (the "
            f"nearest is {float(nearest[worst]):g} px away)"
        )
    return float(nearest.max()), float(score[torch.arange(len(partner)), partner].max())


def open_session(path: Path, threads: int = 1) -> Any:
    """The file in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, image: Tensor) -> Detections:
    """Detections of a (3, h, w) uint8 image. ValueError where the graph cannot be run on it."""
    try:
        outputs = session.run(None, {"image": image.permute(1, 2, 0).contiguous().numpy()})
    except Exception as error:  # ONNX Runtime's errors have no name in common
        raise ValueError(f"ONNX Runtime cannot run the graph: {error}") from error
    return Detections(*(torch.from_numpy(output) for output in outputs))


def _write(predictor: Predictor, info: StudentInfo, image: Tensor, path: Path) -> None:
    import onnx

    height, width = image.shape[1:]
    names = ("boxes", "scores", "labels")
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of every Python number; the size is meant to be a constant, and `compare` is the judge.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Graph(predictor, height, width).eval(),
            (image.permute(1, 2, 0).contiguous(),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(names),
            dynamic_axes={name: {0: "objects"} for name in names},
        )
    model = onnx.load(str(path))
    categories = [{"id": category.id, "name": category.name} for category in info.categories]
    facts = {"categories": json.dumps(categories), "weights_sha256": info.sha256, "layout": "HWC RGB uint8"}
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
