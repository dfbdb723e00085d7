"""A small detector and hand-made taps, for tests of methods. Seeds make every value reproducible."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from data_sharding.batch import Batch, Geometry, Outputs, Taps
from data_sharding.world import World
from kd.blocks import points as pts
from kd.blocks.align import grid
from kd.blocks.answers import Answers, of_all_images
from kd.blocks.assign import assign
from kd.blocks.decoder import DecoderConfig
from kd.blocks.dense import flat
from kd.blocks.distribution import sides
from kd.blocks.foreground import all_boxes
from kd.blocks.inquiry_head import InquiryConfig
from kd.detectors.base import Detections, Detector, Shapes
from kd.methods.base import Advice, Assistant, Method, Pair, Scene

STRIDES = (8, 16, 32)
CANVAS = (96, 136)
"""Odd sizes: 12x17, 6x9 and 3x5 cells."""
BINS = 4
DECODER, INQUIRY = DecoderConfig(width=8, heads=2), InquiryConfig(width=4, depth=1)
"""Of assistants that tests can wait for."""
SHAPES = Shapes(
    c5_channels=8, c5_stride=32, pyramid_channels=8, strides=STRIDES, num_classes=3, places=("fake",), bins=BINS
)


class FakeDetector(Detector):
    """One shared 1x1 convolution as a head, always with the same weights, whose boxes are distributions; soft targets
    compared as the contract says, every cell a positive. Its answers are those of cells whose middle lies in a box."""

    def __init__(self, shapes: Shapes = SHAPES) -> None:
        super().__init__()
        self.shapes, self.backbone = shapes, nn.Identity()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.head = nn.Conv2d(shapes.pyramid_channels, shapes.num_classes + 4 * (BINS + 1), 1)

    def features(self, images: Tensor, freeze_backbone: bool = False) -> Taps:
        raise AssertionError("a method never runs a backbone")

    def predict(
        self,
        pyramid: tuple[Tensor, ...],
        geometry: Geometry,
        proposals: tuple[Tensor, ...] | None = None,
        sampling: Batch | None = None,
    ) -> Outputs:
        found = [self.head(level) for level in pyramid]
        classes = self.shapes.num_classes
        return Outputs(tuple(x[:, :classes] for x in found), tuple(x[:, classes:] for x in found))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"positives": torch.tensor(float(sum(len(b) for b in batch.boxes)))}

    def task_losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        total = sum((x.square().sum() for x in outputs.class_logits), start=torch.zeros(()))
        return {"cls": total / batch.totals["positives"].clamp(min=1)}

    def distill_losses(self, student: Outputs, target: Outputs, batch: Batch, box_loss: str) -> dict[str, Tensor]:
        count = batch.totals["positives"].clamp(min=1)
        cls = [
            F.binary_cross_entropy_with_logits(s, t.detach().sigmoid(), reduction="sum")
            for s, t in zip(student.class_logits, target.class_logits, strict=True)
        ]
        box = [(s - t.detach()).square().sum() for s, t in zip(student.box_deltas, target.box_deltas, strict=True)]
        return {"cls": torch.stack(cls).sum() / count, "box": torch.stack(box).sum() / count}

    def answers(self, outputs: Outputs, batch: Batch) -> Answers:
        found = pts.grid(batch.geometry.canvas, self.shapes.strides, 0.5, batch.images.device)
        (boxes, image), sizes = all_boxes(batch), batch.geometry.sizes
        matched = assign(boxes, image, sizes, found, radius=9.0, nearest=True)
        logits = flat(outputs.class_logits, found.shapes, self.shapes.num_classes)
        distances, edges = sides(flat(outputs.box_deltas, found.shapes, 4 * (BINS + 1)))
        assert edges is not None
        share = 1 / batch.totals["positives"].clamp(min=1)
        facts = matched, found.inside_images(sizes), torch.cat(batch.labels), share
        common = of_all_images((logits, distances), pts.squares(found, 8), *facts)
        xy, stride = found.xy.repeat(len(batch), 1), found.stride.repeat(len(batch))
        lengths = tuple(rows * columns for rows, columns in found.shapes)
        decode = partial(pts.decode, xy, stride)
        return Answers(**common, regions=False, decode=decode, lengths=lengths, edges=edges.flatten(0, 1))

    def keep_classes(self, classes: Sequence[int]) -> None:
        raise AssertionError("a method never changes a head")

    def detect(self, outputs: Outputs, geometry: Geometry) -> list[Detections]:
        raise AssertionError("a method never decodes")


def pair(student: Shapes = SHAPES, teacher: Shapes = SHAPES, world: World | None = None, accumulate: int = 1) -> Pair:
    return Pair(student=student, teacher=teacher, world=world or World(), accumulate=accumulate)


def wider(shapes: Shapes = SHAPES) -> Shapes:
    """A teacher with more channels."""
    return replace(shapes, c5_channels=12, pyramid_channels=16)


def taps(images: int, seed: int, shapes: Shapes = SHAPES, canvas: tuple[int, int] = CANVAS) -> Taps:
    generator = torch.Generator().manual_seed(seed)

    def level(channels: int, stride: int) -> Tensor:
        return torch.randn(images, channels, *grid(canvas, stride), generator=generator)

    pyramid = tuple(level(shapes.pyramid_channels, stride) for stride in shapes.strides)
    return Taps(level(shapes.c5_channels, shapes.c5_stride), pyramid)


def require_grad(found: Taps) -> Taps:
    assert found.c5 is not None
    return Taps(found.c5.clone().requires_grad_(), tuple(x.clone().requires_grad_() for x in found.pyramid))


def tensors(found: Taps) -> list[Tensor]:
    return [*(() if found.c5 is None else (found.c5,)), *found.pyramid]


def rows(found: Taps, which: slice | list[int]) -> Taps:
    """The taps of some of the images."""
    return Taps(None if found.c5 is None else found.c5[which], tuple(x[which] for x in found.pyramid))


def batch(
    images: int, boxes: int = 2, totals: int | None = None, canvas: tuple[int, int] = CANVAS, first: int = 0
) -> Batch:
    """`images` images with the same `boxes` boxes, part of a global batch of `totals` images; ids from `first` on."""
    one = torch.tensor([[4.0, 4.0, 20.0, 30.0], [50.0, 10.0, 90.0, 80.0]])[:boxes]
    count = float(images if totals is None else totals)
    picture = torch.randint(0, 256, (3, *canvas), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(
        images=picture.expand(images, -1, -1, -1).clone(),
        geometry=Geometry(canvas, torch.tensor([canvas] * images)),
        boxes=(one,) * images,
        labels=(torch.zeros(boxes, dtype=torch.int64),) * images,
        ignore=(torch.zeros(0, 4),) * images,
        image_ids=tuple(range(first, first + images)),
        views=(0,) * images,
        totals={
            "images": torch.tensor(count),
            "boxes": torch.tensor(count * boxes),
            "positives": torch.tensor(count * boxes),
        },
    )


def with_boxes(of: Batch, boxes: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Batch:
    """The same images with other objects, one global batch."""
    count = torch.tensor(float(sum(len(b) for b in boxes)))
    totals = {name: torch.tensor(float(len(of))) if name == "images" else count for name in of.totals}
    return replace(of, boxes=boxes, labels=labels).with_totals(totals)


def run(
    method: Method,
    student: Taps,
    teacher: Taps,
    of: Batch,
    detector: FakeDetector | None = None,
    assistant: Assistant | None = None,
) -> dict[str, Tensor]:
    """The method's terms, advised by `assistant`, or else by the detector's head on the student's own pyramid, as an
    assistant that begins there would."""
    detector = detector or FakeDetector()
    outputs = detector.predict(student.pyramid, of.geometry)
    if assistant is None:
        advice = Advice(detector, detector.predict(student.detach().pyramid, of.geometry))
    else:
        advice = advised(assistant, student, teacher, of, detector)
    if method.needs_head:
        head = _head_of(teacher, detector)
        advice = replace(advice, ask=lambda: head.predict(teacher.detach().pyramid, of.geometry).detach())
    return method.losses(student, outputs, teacher, of, advice)


def _head_of(teacher: Taps, student: FakeDetector) -> FakeDetector:
    """The teacher's head: the student's own where the widths agree, so that equal taps give equal answers."""
    width = teacher.pyramid[0].shape[1]
    if width == student.shapes.pyramid_channels:
        return student
    return FakeDetector(replace(student.shapes, pyramid_channels=width))


def scene(student: Taps, teacher: Taps, of: Batch, detector: Detector | None = None) -> Scene:
    """What the distiller shows to an assistant."""
    return Scene(student=detector or FakeDetector(), taps=student.detach(), teacher=teacher.detach(), batch=of)


@torch.no_grad()
def advised(assistant: Assistant, student: Taps, teacher: Taps, of: Batch, detector: Detector | None = None) -> Advice:
    """What the assistant tells its method."""
    seen = scene(student, teacher, of, detector)
    return assistant.advise(assistant.watch(seen), seen).detach()


@cache
def classifier() -> Path:
    """The weights of a small classifier of the three classes."""
    path = Path(_FOLDER.name) / "classifier.pt"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        torch.save(get_model(CLASSIFIER, weights=None, num_classes=3).state_dict(), path)
    return path


CLASSIFIER = "squeezenet1_1"
_FOLDER = TemporaryDirectory()
