"""A pyramid made from labels (LGD, AAAI 2022, arXiv:2109.11496, section 3): each object's label and its appearance in
the student's map meet in an attention, and what comes out is painted back into its box.

Shape letters: B images, N objects of the fullest image with the image itself as the first, K classes, C channels,
H x W cells of a level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data_sharding.batch import Batch
from kd.blocks.box_cells import box_cells


def described(batch: Batch, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 4 + K) in [-1, 1]: box as shares of the canvas and one-hot class; (B, N, 4) boxes; (B, N) bool: not
    padding. The first object of every image is the whole image, of no class: the context."""
    height, width = batch.geometry.canvas
    sizes = batch.geometry.sizes.flip(1).float()
    whole = torch.cat([torch.zeros_like(sizes), sizes], dim=1)[:, None]
    boxes = torch.cat([whole, pad_sequence(list(batch.boxes), batch_first=True)], dim=1)
    labels = F.one_hot(pad_sequence(list(batch.labels), batch_first=True), classes)
    labels = torch.cat([labels.new_zeros(len(labels), 1, classes), labels], dim=1)
    count = torch.tensor([len(b) for b in batch.boxes], device=boxes.device)
    there = torch.arange(boxes.shape[1], device=boxes.device) <= count[:, None]
    shares = boxes / boxes.new_tensor([width, height, width, height])
    return 2 * torch.cat([shares, labels], dim=-1) - 1, boxes, there


class LabelEncoder(nn.Module):
    """Each object by itself, then beside the strongest answers of all objects of its image (PointNet's way)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Linear(4 + classes, 64), _norm(64), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Linear(64, 128), _norm(128), nn.ReLU(), nn.Linear(128, 1024), _norm(1024), nn.ReLU()
        )
        self.join = nn.Sequential(nn.Linear(64 + 1024, width), _norm(width), nn.ReLU())

    def forward(self, described: Tensor, there: Tensor) -> Tensor:
        """(B, N, 4 + K) and (B, N) bool -> (B, N, width)."""
        near = self.near(described)
        strongest = self.deep(near).masked_fill(~there[..., None], -torch.inf).amax(dim=1, keepdim=True)
        return self.join(torch.cat([near, strongest.expand(-1, near.shape[1], -1)], dim=-1))


class InstructiveLevels(nn.Module):
    """Student's levels and encoded labels -> levels that know the labels; the same weights for every level."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"{heads} heads must divide the student's pyramid width {channels}; choose another number of heads"
            )
        self.appear = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), _map_norm(channels), nn.ReLU())
        self.attend = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.own, self.context = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.paint = nn.Conv2d(channels, channels, 3, padding=1)
        parts = [(nn.Conv2d(channels, channels, 3, padding=1), _map_norm(channels)) for _ in range(3)]
        self.refine = nn.Sequential(*parts[0], nn.ReLU(), *parts[1], nn.ReLU(), *parts[2])

    def forward(self, level: Tensor, labels: Tensor, inside: Tensor, there: Tensor) -> Tensor:
        """(B, C, H, W), encoded labels (B, N, C), their cells (B, N, H, W) bool, not padding (B, N) bool -> a level of
        the same shape."""
        cells = self.appear(level).flatten(2).transpose(1, 2)
        mask = (inside & there[..., None, None]).flatten(2).to(cells.dtype)
        appearance = mask @ cells / mask.sum(dim=2, keepdim=True).clamp(min=1)
        known, _ = self.attend(appearance, labels, labels, key_padding_mask=~there, need_weights=False)
        painted = mask[:, 1:].transpose(1, 2) @ self.own(known[:, 1:]).to(mask.dtype)
        painted = self.paint(painted.transpose(1, 2).unflatten(2, level.shape[-2:]))
        return self.refine((painted + self.context(known[:, 0])[..., None, None]).relu())


def level_cells(boxes: Tensor, levels: tuple[Tensor, ...], strides: tuple[int, ...]) -> list[Tensor]:
    """(B, N, 4) -> (B, N, H, W) bool per level."""
    return [box_cells(boxes, (x.shape[2], x.shape[3]), stride) for x, stride in zip(levels, strides, strict=True)]


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False)


def _map_norm(channels: int) -> nn.GroupNorm:
    """Over channels and cells of an image."""
    return nn.GroupNorm(1, channels, affine=False)
