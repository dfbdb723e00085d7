"""What a decoder is asked about: objects that are there and objects that are not (ICD, NeurIPS 2021, section 3.2).

Shape letters: B images, N boxes of the fullest image, Q inquiries of an image, F of them invented, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_sharding.batch import Batch
from kd.blocks.draw import chances
from kd.blocks.position import place_code

SMALLEST = 4.0
"""Pixels: invented objects have sides from here on."""
SIZE_BINS = 5
PLACE_CHANNELS = 256


@dataclass(frozen=True)
class Inquiries:
    """Objects to look for, padded to the image with most of them. Lengths are canvas pixels."""

    boxes: Tensor
    """(B, Q, 4)."""
    centres: Tensor
    """(B, Q, 2): about where (x, y) the object is said to be."""
    labels: Tensor
    """(B, Q) int64."""
    real: Tensor
    """(B, Q) bool: a labelled object."""
    present: Tensor
    """(B, Q) bool: real or invented, not padding."""

    def describe(self, classes: int, unit: int) -> Tensor:
        """(B, Q, K + 266): one-hot class, sine code of the centre in cells of `unit` pixels, and one-hot powers of two
        of width and height in such cells."""
        sizes = (self.boxes[..., 2:] - self.boxes[..., :2]).clamp(min=1)
        bins = F.one_hot(size_bins(sizes, unit), SIZE_BINS).flatten(-2)
        return torch.cat([F.one_hot(self.labels, classes), place_code(self.centres / unit, PLACE_CHANNELS), bins], -1)


def size_bins(sizes: Tensor, unit: int) -> Tensor:
    """Sides in pixels -> int64 in 0..4: below 2, 4, 8, 16 cells of `unit` pixels, or more."""
    return (sizes / unit).log2().floor().long().clamp(0, SIZE_BINS - 1)


def descriptor_width(classes: int) -> int:
    """Numbers in a description."""
    return classes + PLACE_CHANNELS + 2 * SIZE_BINS


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How inquiries are made."""

    classes: int
    fakes: int
    """Invented objects per real one; at least one per image."""
    most: int
    """Inquiries per image."""
    jitter: float
    """Centres are off by up to this share of the box."""
    purpose: str
    """Names the random draws."""
    largest: float | None = None
    """Longest side of an invented object; None: the image's shorter side."""


def ask(batch: Batch, how: Asking, wanted: Tensor | None = None, hot: tuple[Tensor, Tensor] | None = None) -> Inquiries:
    """Inquiries about the labelled objects of a batch, or those `wanted` (B, N) of them, and about invented ones.

    `hot` are (B, P, 2) places and (B, P) bool: where it is true, the invented object stands there; elsewhere anywhere
    on the image. Everything is drawn by (`batch.key`, purpose, image).
    """
    boxes = pad_sequence(list(batch.boxes), batch_first=True)
    labels = pad_sequence(list(batch.labels), batch_first=True)
    there = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in batch.labels], batch_first=True)
    count = boxes.shape[1]
    drawn = chances((*batch.key, how.purpose, "real"), batch.image_ids, (count, 3)).to(boxes)
    there = there if wanted is None else there & wanted
    # Where there are too many, chance decides.
    first = torch.where(there, drawn[..., 0], 2.0).argsort(dim=1)[:, : how.most]
    boxes, labels, there, drawn = (_taken(x, first) for x in (boxes, labels, there, drawn))
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    centres = centres + (2 * drawn[..., 1:] - 1) * how.jitter * (boxes[..., 2:] - boxes[..., :2])
    width = max(1, min(how.fakes * count, how.most))
    invented = _invent(batch, how, width, hot)
    number = there.sum(dim=1)
    asked = (how.fakes * number).minimum(how.most - number).clamp(min=1)
    present = torch.arange(width, device=boxes.device) < asked[:, None]
    return Inquiries(
        torch.cat([boxes, invented[0]], dim=1),
        torch.cat([centres, invented[1]], dim=1),
        torch.cat([labels, invented[2]], dim=1),
        torch.cat([there, torch.zeros_like(present)], dim=1),
        torch.cat([there, present], dim=1),
    )


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """The rows `order` (B, n) of each image of (B, N, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _invent(batch: Batch, how: Asking, count: int, hot: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, F, 4), centres (B, F, 2) and labels (B, F): class and place drawn evenly, sides log-evenly."""
    sizes = batch.geometry.sizes.flip(1)[:, None].float()  # (B, 1, 2) width and height
    drawn = chances((*batch.key, how.purpose, "invented"), batch.image_ids, (count, 5)).to(sizes)
    centres = drawn[..., :2] * sizes
    if hot is not None:
        places, valid = (x[:, :count] for x in hot)
        here = torch.where(valid[..., None], places, centres[:, : places.shape[1]])
        centres = torch.cat([here, centres[:, places.shape[1] :]], dim=1)
    shorter = sizes.amin(dim=2, keepdim=True)
    longest = shorter if how.largest is None else shorter.clamp(max=how.largest)
    sides = SMALLEST * (longest / SMALLEST).clamp(min=1) ** drawn[..., 2:4]
    labels = (drawn[..., 4] * how.classes).long().clamp(max=how.classes - 1)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1), centres, labels
