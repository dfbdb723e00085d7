"""What all codecs share: the stored form of one tap of one image, and what a codec promises.

Rows are positions and channels come last, so that a batch is one gather, a foreground subset is a subset of rows, and
the decoded map has torch's `channels_last` layout without a copy. Shape letters: C channels, h x w cells, P rows.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor


class CodecError(ValueError):
    """A tap cannot be stored as asked, or stored bytes do not have the length that they must have."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One tap of one image as it is stored."""

    rows: int
    """P, the number of stored positions; h * w when the codec is dense."""
    payload: memoryview | bytes
    """The P rows of C values, one after the other."""
    scale: bytes = b""
    """float16 numbers that the stored integers are multiplied by: C of them, or P; empty for floating-point rows."""
    mask: bytes = b""
    """Packed bits of the h * w positions that are stored, row by row; empty when all are."""


Per = Literal["channel", "position"]
Bits = bytes | memoryview | np.ndarray


class Codec(Protocol):
    """What the writer, the reader and the plan of a cache know of a codec."""

    @property
    def name(self) -> str:
        """The name that cache keys use."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the stored rows."""
        ...

    @property
    def per(self) -> Per | None:
        """What each scale belongs to; None where there are none."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether only foreground is stored."""
        ...

    def encode(self, x: Tensor, mask: Tensor | None = None, *, level: str) -> Encoded:
        """Encode a (C, h, w) tap of any float type on any device; `level` names it in errors. A sparse codec keeps
        the positions of `mask`, (h, w) bool. Raises CodecError for what cannot be stored."""
        ...


def row_bytes(codec: Codec, channels: int) -> int:
    """Bytes of one stored position, its scale apart."""
    return channels * codec.dtype.itemsize


def scale_count(codec: Codec, channels: int, rows: int) -> int:
    """How many scales a tap of so many channels and stored rows has."""
    return 0 if codec.per is None else channels if codec.per == "channel" else rows


def mask_bytes(codec: Codec, cells: int) -> int:
    """Bytes that tell which of h * w positions are stored."""
    return -(-cells // 8) if codec.sparse else 0


def tap_bytes(codec: Codec, channels: int, rows: int, cells: int) -> int:
    """All bytes of one tap of one image: rows, scales and mask."""
    return rows * row_bytes(codec, channels) + 2 * scale_count(codec, channels, rows) + mask_bytes(codec, cells)


def require_lengths(codec: Codec, channels: int, cells: int, rows: int, scale: int, mask: Bits, *, level: str) -> None:
    """Raise CodecError where a stored tap of h * w `cells` cannot have so many rows, bytes of scales, or this mask."""
    if rows != cells if not codec.sparse else not 0 <= rows <= cells:
        held = "keeps some of" if codec.sparse else "keeps all"
        raise CodecError(f"tap {level!r}: codec {codec.name} {held} {cells} positions, found {rows}")
    for what, needed, found in (
        ("scales", 2 * scale_count(codec, channels, rows), scale),
        ("mask", mask_bytes(codec, cells), len(mask)),
    ):
        if found != needed:
            raise CodecError(f"tap {level!r}: codec {codec.name} needs {needed} bytes of {what}, found {found}")
    named = int(np.bitwise_count(np.frombuffer(mask, np.uint8)).sum()) if codec.sparse else rows
    if named != rows:
        raise CodecError(f"tap {level!r}: the mask names {named} of {cells} positions, {rows} are stored")


def as_rows(x: Tensor, level: str) -> Tensor:
    """A (C, h, w) tap as (h * w, C)."""
    if x.ndim != 3:
        raise CodecError(f"tap {level!r}: expected (C, h, w), got shape {tuple(x.shape)}")
    return x.detach().permute(1, 2, 0).reshape(-1, x.shape[0])


def require_finite(rows: Tensor, level: str) -> None:
    """Raise CodecError where the teacher itself gave something that is no number."""
    if not torch.isfinite(rows).all():
        bad = int((~torch.isfinite(rows)).sum())
        raise CodecError(
            f"tap {level!r}: {bad} of {rows.numel()} values are already NaN or infinite; check the teacher"
        )


def as_bytes(x: Tensor) -> memoryview:
    """The memory of a tensor, not copied where it lies on the CPU in one piece."""
    return x.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
