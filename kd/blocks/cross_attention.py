"""Cross-scale attention at one pyramid level (ScaleKD, CVPR 2023, eqs. 3-6): the student's cells ask, the teacher's
cells, gathered at one rate per group of heads, answer. The keys and values follow Shunted Transformer (CVPR 2022).

Shape letters: B images, C channels, H x W cells of the level, N cells in a row.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.blocks.position import local_projection_, sine_code

Roles = Literal["eq", "text"]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each cell."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Gather(nn.Module):
    """MSC of eq. 4: rate x rate cells become one, by a learned convolution, LayerNorm and GELU; rate 1 changes
    nothing. Sizes that the rate does not divide are padded with zeros at the end, so they round up."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        layers = (nn.Conv2d(channels, channels, rate, stride=rate), ChannelNorm(channels), nn.GELU())
        self.layers = nn.Identity() if rate == 1 else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / rate), ceil(W / rate))."""
        height, width = x.shape[-2:]
        return self.layers(F.pad(x, (0, -width % self.rate, 0, -height % self.rate)))


class HeadGroup(nn.Module):
    """The heads that share one rate."""

    def __init__(
        self, channels: int, heads: int, head_width: int, rate: int, position: bool, locality: float | None
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads, self.rate = heads, rate
        self.gather = Gather(channels, rate)
        self.query = nn.Linear(channels, inner)
        self.key = nn.Linear(channels, inner)
        self.value = nn.Linear(channels, inner)
        self.local = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        """P of eq. 5."""
        self.query_place = nn.Linear(channels, inner, bias=False) if position else None
        self.key_place = nn.Linear(channels, inner, bias=False) if position else None
        if self.query_place is not None and self.key_place is not None and locality is not None:
            for linear in (self.query_place, self.key_place):
                local_projection_(linear.weight, heads, rate, locality)

    def forward(self, asks: Tensor, answers: Tensor, contents: Tensor) -> Tensor:
        """Sources of queries, keys and values, each (B, C, H, W) -> (B, heads * head width, H, W)."""
        keys = self.gather(answers)
        values = keys if contents is answers else self.gather(contents)
        v = _to_map(self.value(_to_rows(values)), values)
        v = _to_rows(v + self.local(v))
        q = _placed(self.query(_to_rows(asks)), asks, self.query_place, cell=1)
        k = _placed(self.key(_to_rows(keys)), keys, self.key_place, cell=self.rate)
        # The fused kernel never builds the (H W) x (H W / rate^2) scores that P2 and P3 could not hold. Never in half
        # precision: scores of places are differences of large products, rounded by more than one cell's worth.
        with torch.autocast(asks.device.type, enabled=False):
            q, k, v = (self._split(x.to(q.dtype)) for x in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v)
        return _to_map(mixed.transpose(1, 2).flatten(2), asks)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, heads * head width) -> (B, heads, N, head width)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """All heads of one level, W^O and the residual: (student level, teacher level) -> a level of the student's shape.

    The normalisation stands before the projections and the residual outside, so that with `zero_init` (W^O = 0) the
    output starts as the student's level, exactly (ambiguity S6). With `locality` (in cells of the gathered grid) the
    attention starts at each cell's own place in the teacher's map instead of everywhere.
    """

    def __init__(
        self, student: int, teacher: int, heads: int, rates: tuple[int, ...], *,
        roles: Roles, residual: bool, zero_init: bool, position: bool, locality: float | None, norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if student % heads or heads % len(rates):
            raise ValueError(
                f"{heads} heads must divide the student's pyramid width {student} and split evenly over the rates "
                f"{rates}; choose another number of heads"
            )
        self.roles, self.residual = roles, residual
        self.enter = nn.Identity() if student == teacher else nn.Conv2d(teacher, student, 1)
        self.norm_student, self.norm_teacher = (ChannelNorm(student) if norm else nn.Identity() for _ in range(2))
        distinct = sorted(set(rates), reverse=True)
        self.groups = nn.ModuleList(
            HeadGroup(student, heads // len(rates) * rates.count(rate), student // heads, rate, position, locality)
            for rate in distinct
        )
        self.out = nn.Conv2d(student, student, 1)
        if zero_init:
            for parameter in self.out.parameters():
                nn.init.zeros_(parameter)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C_student, H, W) and (B, C_teacher, H, W) -> (B, C_student, H, W)."""
        s, t = self.norm_student(student), self.norm_teacher(self.enter(teacher))
        asks, answers, contents = (s, t, t) if self.roles == "eq" else (t, t, s)
        mixed = self.out(torch.cat([group(asks, answers, contents) for group in self.groups], dim=1))
        # A pyramid's levels have no normaliser and grow freely (to an RMS of 60 in a short run), which W^O at CSA's
        # small learning rate could not follow: it speaks in units of the student's level.
        mixed = mixed * student.detach().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return student + mixed if self.residual else mixed


def _placed(rows: Tensor, like: Tensor, place: nn.Linear | None, cell: int) -> Tensor:
    """Queries or keys (B, N, C') with what their cells' places add; `cell` as in `sine_code`."""
    if place is None:
        return rows
    code = sine_code(like.shape[2], like.shape[3], place.in_features, cell, like.device).to(place.weight.dtype)
    with torch.autocast(like.device.type, enabled=False):
        return rows.to(code.dtype) + place(_to_rows(code))


def _to_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _to_map(x: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W) with the grid of `like`."""
    return x.transpose(1, 2).unflatten(2, like.shape[-2:])
