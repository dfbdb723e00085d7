"""How one tap of a teacher becomes bytes and comes back.

Rows are positions and channels come last, so that a batch is one gather, a foreground subset is a subset of rows, and
the decoded map has torch's `channels_last` layout without a copy. Shape letters: C channels, h x w cells, P rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

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
    """What turns stored values into features; empty when the codec needs none."""
    mask: bytes = b""
    """Packed bits of the h * w positions that are stored; empty when all are."""


class Codec(Protocol):
    """What the writer and the reader of a cache know of a codec."""

    @property
    def name(self) -> str:
        """The name that recipes and cache keys use."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of decoded maps; training code converts them on its own device."""
        ...

    def row_bytes(self, channels: int) -> int:
        """Bytes of one stored position."""
        ...

    def encode(self, x: Tensor, *, level: str) -> Encoded:
        """Encode a (C, h, w) tap; `level` names it in errors."""
        ...

    def decode_into(self, encoded: Encoded, out: Tensor, *, level: str) -> None:
        """Write the features into `out`, an (h * w, C) contiguous CPU tensor of `dtype`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Every position as plain floating-point numbers. What does not fit is an error, never an infinity."""

    name: str
    dtype: torch.dtype

    @property
    def _numpy(self) -> np.dtype:
        return torch.empty(0, dtype=self.dtype).numpy().dtype

    def row_bytes(self, channels: int) -> int:
        """Bytes of one stored position."""
        return channels * self.dtype.itemsize

    def encode(self, x: Tensor, *, level: str) -> Encoded:
        """Encode a (C, h, w) tap of any float type on any device."""
        if x.ndim != 3:
            raise CodecError(f"tap {level!r}: expected (C, h, w), got shape {tuple(x.shape)}")
        rows = x.detach().permute(1, 2, 0).reshape(-1, x.shape[0])
        stored = rows.to(self.dtype)
        if not torch.isfinite(stored).all():
            raise CodecError(self._why_not_finite(rows, level))
        return Encoded(rows=len(stored), payload=stored.contiguous().cpu().numpy().reshape(-1).view(np.uint8).data)

    def decode_into(self, encoded: Encoded, out: Tensor, *, level: str) -> None:
        """Write the features into `out`, an (h * w, C) contiguous CPU tensor of `dtype`."""
        if encoded.rows != len(out):
            raise CodecError(f"tap {level!r}: codec {self.name} keeps all {len(out)} positions, found {encoded.rows}")
        values = np.frombuffer(encoded.payload, self._numpy)
        if values.size != out.numel():
            raise CodecError(f"tap {level!r}: expected {out.numel()} {self.name} values, found {values.size}")
        # numpy copies a read-only mapping without a warning and without holding the interpreter's lock.
        np.copyto(out.numpy(), values.reshape(out.shape))

    def _why_not_finite(self, rows: Tensor, level: str) -> str:
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows)).sum())
            return f"tap {level!r}: {bad} of {rows.numel()} values are already NaN or infinite; check the teacher"
        limit, largest = torch.finfo(self.dtype).max, float(rows.abs().max())
        count = int((rows.abs() > limit).sum())
        return (
            f"tap {level!r}: {count} of {rows.numel()} values do not fit codec {self.name} "
            f"(largest {largest:.6g}, limit {limit:.6g}); store this teacher with codec fp32"
        )


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "fp16": Dense(name="fp16", dtype=torch.float16),
        "fp32": Dense(name="fp32", dtype=torch.float32),
    }
)


def codec(name: str) -> Codec:
    """The codec of that name."""
    if name not in CODECS:
        raise ValueError(f"no codec {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name]


def decode(encoded: Encoded, name: str, shape: tuple[int, int, int], *, level: str) -> Tensor:
    """Decode one tap to a (C, h, w) tensor whose memory has the channels last."""
    channels, height, width = shape
    found = codec(name)
    out = torch.empty(height * width, channels, dtype=found.dtype)
    found.decode_into(encoded, out, level=level)
    return out.view(height, width, channels).permute(2, 0, 1)
