"""LGD (Zhang et al., AAAI 2022, arXiv:2109.11496): no teacher. An assistant mixes the labels into the student's own
pyramid; the student's head must detect well on what comes out, which trains the assistant and the head alike, and the
student's maps, through an adapter, equal that pyramid, each channel of each image standardised. Reads no teacher.

Its floor is what labels tell and pixels do not. Departures: the assistant sees the student's maps without gradient and
has an AdamW of its own, while the head's part of its loss is the student's (`moves_head`); the encoder has no spatial
transformers; appearance is gathered over every cell that meets a box, so that a small object has one; the adapter
begins to learn with the loss, not before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.divergence import squared_error
from kd.blocks.generate import Generator
from kd.blocks.label_encoder import InstructiveLevels, LabelEncoder, described, level_cells
from kd.blocks.norms import image_standardised
from kd.methods import base
from kd.methods.base import Advice, Method, MethodConfig, Pair, Scene


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    start: float = 1 / 3
    """The assistant learns alone for the first 30k of 90k iterations."""
    freeze: float = 1 / 9
    heads: int = 8
    moves_head: bool = True
    """The detection loss of the assistant's pyramid moves the student's head as well."""
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                "heads must be >= 1, learning_rate > 0 and weight_decay >= 0, got "
                f"{self.heads}, {self.learning_rate} and {self.weight_decay}"
            )

    @property
    def taught(self) -> bool:
        return False


class Loss(Method):
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.adapt = Generator(pair.student.pyramid_channels, layers=3)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        if not advice.pyramid:
            raise ValueError("lgd's loss needs its assistant's pyramid")
        sides = zip((self.adapt(x) for x in student.pyramid), advice.pyramid, strict=True)
        errors = [squared_error(image_standardised(s), image_standardised(t)) for s, t in sides]
        # The mean over the numbers of all levels together: the finest ones count most, as in the authors' code.
        numbers = sum(error[0].numel() for error in errors)
        total = torch.stack([error.sum() for error in errors]).sum()
        return {"feat": total / (numbers * batch.totals["images"].clamp(min=1))}


class Assistant(base.PyramidAssistant):
    """Label encoder, attention and painting."""

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config, self.moves_head = config, config.moves_head
        self.strides, self.classes = pair.student.strides, pair.student.num_classes
        self.encoder = LabelEncoder(pair.student.num_classes, pair.student.pyramid_channels)
        self.levels = InstructiveLevels(pair.student.pyramid_channels, config.heads)

    def watch(self, scene: Scene) -> tuple[Tensor, ...]:
        told, boxes, there = described(scene.batch, self.classes)
        return self(scene.taps.pyramid, told, level_cells(boxes, scene.taps.pyramid, self.strides), there)

    def forward(
        self, pyramid: tuple[Tensor, ...], described: Tensor, inside: Sequence[Tensor], there: Tensor
    ) -> tuple[Tensor, ...]:
        """Student's levels, descriptions (B, N, 4 + K), each level's cells (B, N, H, W) and what is not padding (B, N)
        -> levels of the student's shape."""
        labels = self.encoder(described, there)
        return tuple(self.levels(x, labels, cells, there) for x, cells in zip(pyramid, inside, strict=True))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.config.learning_rate, weight_decay=self.config.weight_decay)
