"""The instance decoder (ICD, NeurIPS 2021, arXiv:2110.12724; HMKD uses it too): an inquiry attends to a
pyramid's cells, and the decoder learns to do so well by telling real objects from invented ones and by finding their
sides. The attention then says which cells matter to the object.

Shape letters: B images, Q inquiries of an image, U cells of all levels, C channels, M heads.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_sharding.batch import Geometry
from kd.blocks.inquiry import PLACE_CHANNELS, Inquiries, descriptor_width, size_bins
from kd.blocks.position import sine_code


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The decoder, what it is asked, and how it learns."""

    width: int = 256
    heads: int = 8
    fakes: int = 5
    """Invented objects per real one."""
    most: int | None = None
    """Inquiries per image; None: 300 for students of one stage, 100 for two."""
    jitter: float = 0.3
    """How far the centre that is asked about may be off, as a share of the box."""
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    clip: float | None = 0.01
    """Largest 2-norm of its gradient; null: not clipped."""
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ValueError(f"decoder.heads must divide decoder.width, got {self.heads} and {self.width}")
        if self.fakes < 1 or (self.most is not None and self.most < 2):
            raise ValueError(f"decoder.fakes must be >= 1 and decoder.most >= 2, got {self.fakes} and {self.most}")
        if self.jitter < 0 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                "decoder.jitter and decoder.weight_decay must be >= 0 and decoder.learning_rate > 0, got "
                f"{self.jitter}, {self.weight_decay} and {self.learning_rate}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"decoder.clip must be > 0, or null, got {self.clip}")

    def most_of(self, family: str) -> int:
        """Inquiries per image for a student of this family."""
        return self.most if self.most is not None else 300 if family == "one_stage" else 100

    def rate(self, progress: float) -> float:
        """What the learning rate is multiplied by at `progress` of the schedule."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress))


def adamw(config: DecoderConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the module's parameters, as the settings say."""
    return torch.optim.AdamW(module.parameters(), config.learning_rate, weight_decay=config.weight_decay)


class InstanceDecoder(nn.Module):
    """One layer: attention, perceptron and LayerNorms; no self-attention, no dropout."""

    def __init__(self, channels: int, classes: int, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.classes, self.heads = classes, config.heads
        self.encode = _perceptron(descriptor_width(classes), width, width, 3)
        """F_b: a description becomes an inquiry."""
        self.place = nn.Linear(PLACE_CHANNELS, channels)
        """F_pe: a cell's place, added to its content for keys alone."""
        self.query = nn.Linear(width, width)
        # The same for every key: a constant added to an inquiry's scores moves no softmax.
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, width)
        self.mix = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.think = _perceptron(width, 4 * width, width, 2)
        self.exists = nn.Linear(width, 1)
        self.sides = nn.Linear(width, 4)

    def forward(
        self, described: Tensor, cells: Tensor, places: Tensor, inside: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Descriptions (B, Q, D), cells (B, U, C), codes of their places (U, 256) and which lie on the image (B, U)
        -> attention (B, M, Q, U), values (B, U, width), logits of existence (B, Q) and the four sides (B, Q, 4)."""
        inquiry = self.encode(described)
        query = self._split(self.query(inquiry))
        key = self._split(self.key(cells + self.place(places)))
        value = self.value(cells)
        scores = (query @ key.transpose(2, 3)).float() / math.sqrt(query.shape[-1])
        attention = scores.masked_fill(~inside[:, None, None], -torch.inf).softmax(dim=-1)
        mixed = (attention.to(value.dtype) @ self._split(value)).transpose(1, 2).flatten(2)
        found = self.norms[0](inquiry + self.mix(mixed))
        found = self.norms[1](found + self.think(found))
        return attention, value, self.exists(found)[..., 0], self.sides(found)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, M, N, width / M)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def look(
        self, asked: Inquiries, levels: tuple[Tensor, ...], strides: tuple[int, ...], geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention (B, M, Q, U) and values (B, U, width) over maps (B, C, H, W) of these strides, and what the decoder
        erred by: (B,) the mean over an image's inquiries of the cross-entropy of existence, and over its real ones of
        the error of the sides as a share of the box."""
        unit = strides[0]
        cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        places = torch.cat([_codes(level, stride // unit) for level, stride in zip(levels, strides, strict=True)])
        inside = torch.cat([_inside(level, s, geometry) for level, s in zip(levels, strides, strict=True)], dim=1)
        described = asked.describe(self.classes, unit)
        attention, value, exists, sides = self(described, cells, places, inside)
        return attention, value, _erred(exists.float(), sides.float(), asked, unit)


def _perceptron(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    widths = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _codes(level: Tensor, cell: int) -> Tensor:
    """(H * W, 256) of a level whose cells have a side of `cell` cells of the finest."""
    code = sine_code(level.shape[2], level.shape[3], PLACE_CHANNELS, cell, level.device)
    return code[0].flatten(1).T


def _inside(level: Tensor, stride: int, geometry: Geometry) -> Tensor:
    """(B, H * W) bool: the cell begins on the image, not on the padding."""
    rows = torch.arange(level.shape[2], device=level.device) * stride < geometry.sizes[:, :1]
    columns = torch.arange(level.shape[3], device=level.device) * stride < geometry.sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None]).flatten(1)


def _erred(exists: Tensor, sides: Tensor, asked: Inquiries, unit: int) -> Tensor:
    """See `InstanceDecoder.look`. A side is told in multiples of the described size, which the inquiry knows."""
    identified = F.binary_cross_entropy_with_logits(exists, asked.real.float(), reduction="none")
    sizes = (asked.boxes[..., 2:] - asked.boxes[..., :2]).clamp(min=1)
    told = F.softplus(sides) * (unit * 2.0 ** size_bins(sizes, unit)).repeat(1, 1, 2)
    truth = torch.cat([asked.centres - asked.boxes[..., :2], asked.boxes[..., 2:] - asked.centres], dim=-1)
    off = ((told - truth).abs() / sizes.repeat(1, 1, 2)).mean(dim=-1)
    return _mean_of(identified, asked.present) + _mean_of(off, asked.real)


def _mean_of(x: Tensor, mask: Tensor) -> Tensor:
    """(B, Q) -> (B,): each image's mean over a mask; 0 where it is empty."""
    return (x * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
