"""One tap of a whole batch as it is stored: what travels to the training device, and its decoding there.

The loader only copies rows; the device multiplies and places them, for all images of a batch in one operation each.
Shape letters: B images, C channels, h x w cells, R rows of all images: B * h * w, or fewer where codecs are sparse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_sharding.codecs.base import Codec, CodecError, Encoded, require_lengths, row_bytes


@dataclass(frozen=True, kw_only=True)
class StoredTap:
    """One tap of B images, of one codec."""

    shape: tuple[int, int, int, int]
    """(B, C, h, w) of the maps."""
    values: Tensor
    """(R, C) fp16, fp32 or int8."""
    scale: Tensor | None = None
    """float16: (B, 1, C) per channel or (R, 1) per position, for int8 values."""
    mask: Tensor | None = None
    """(B, bytes) uint8: which of an image's h * w positions are stored, the first in the lowest bit of the first byte;
    None where all are."""

    def to(self, device: torch.device) -> "StoredTap":
        """The same on `device`; pinned tensors travel without blocking."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        values = self.values.to(device, non_blocking=True)
        return replace(self, values=values, scale=move(self.scale), mask=move(self.mask))

    def maps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, h, w) with channels last in memory, on the device where the rows are; zero where nothing is stored.

        Products are rounded once, from float32, so that they are the same on every device.
        """
        images, channels, height, width = self.shape
        place = self._place()
        rows = self._decoded(dtype, place)
        if place is not None:
            empty = rows.new_zeros(images * height * width, channels)
            rows = empty.index_copy_(0, place, rows)
        return rows.view(images, height, width, channels).permute(0, 3, 1, 2)

    def _place(self) -> Tensor | None:
        """(R,) int64: each row's position among all B * h * w. Its length is known, so that no device is waited for."""
        if self.mask is None:
            return None
        bits = self.mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=self.mask.device) & 1
        stored = bits.flatten(1)[:, : self.shape[2] * self.shape[3]].reshape(-1)
        return torch.nonzero_static(stored, size=len(self.values)).squeeze(1)

    def _decoded(self, dtype: torch.dtype, place: Tensor | None) -> Tensor:
        """(R, C) features."""
        if self.scale is None:
            return self.values.to(dtype)
        scale, values = self.scale.float(), self.values
        cells = self.shape[2] * self.shape[3]
        if scale.ndim == 3 and place is not None:
            scale = scale[:, 0][place // cells]
        elif scale.ndim == 3:
            values = values.view(len(scale), cells, -1)
        return torch.mul(values, scale).to(dtype).view(self.values.shape)


def stack(
    codec: Codec,
    encoded: Sequence[Encoded],
    shape: tuple[int, int, int],
    *,
    level: str,
) -> StoredTap:
    """One (C, h, w) tap of several images, copied into one piece of memory on the CPU, nothing decoded.

    Raises CodecError where what is stored cannot be a tap of that shape.
    """
    channels, cells = shape[0], shape[1] * shape[2]
    for one in encoded:
        require_lengths(codec, channels, cells, one.rows, len(one.scale), one.mask, level=level)
        if len(one.payload) != one.rows * row_bytes(codec, channels):
            raise CodecError(
                f"tap {level!r}: expected {one.rows * channels} {codec.name} values of {codec.dtype.itemsize} bytes, "
                f"found {len(one.payload)} bytes"
            )
    values = _joined([one.payload for one in encoded], codec.dtype).view(-1, channels)
    scale = mask = None
    if codec.per is not None:
        scale = _joined([one.scale for one in encoded], torch.float16)
        scale = scale.view(len(encoded), 1, channels) if codec.per == "channel" else scale.view(-1, 1)
    if codec.sparse:
        mask = _joined([one.mask for one in encoded], torch.uint8).view(len(encoded), -1)
    return StoredTap(shape=(len(encoded), *shape), values=values, scale=scale, mask=mask)


def _joined(parts: Sequence[memoryview | bytes], dtype: torch.dtype) -> Tensor:
    """The bytes of all parts as numbers of a type, copied."""
    joined = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
    return torch.from_numpy(joined.view(torch.empty(0, dtype=dtype).numpy().dtype))
