"""Taps of a whole batch as they are stored: what travels to the training device, and its decoding there.

The loader only copies rows; the device multiplies and places them, for all images of a batch in one operation each.
Shape letters: B images, T taps, C channels, h x w cells of a tap, R rows of all images and taps: as many as there are
cells, or fewer where codecs are sparse.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data_sharding.codecs.base import Codec, CodecError, Encoded, mask_bytes, require_lengths, row_bytes

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class TapGroup:
    """Neighbouring taps of one codec and one width: image by image, of each tap after tap, of each row by row."""

    images: int
    channels: int
    sizes: Sizes
    """The (h, w) of each tap."""
    values: Tensor
    """(R, C) fp16, fp32 or int8."""
    scale: Tensor | None = None
    """float16: (B, T, C) per channel or (R, 1) per position, for int8 values."""
    mask: Tensor | None = None
    """(B, bytes) uint8: which of an image's positions are stored, the first in the lowest bit of the first byte, each
    tap beginning with a byte; None where all are."""
    segments: Tensor | None = None
    """(2, B * T) int64 beside `mask`: how many rows are stored of each image's taps, and their `place_shifts`."""

    def to(self, device: torch.device) -> "TapGroup":
        """The same on `device`; pinned tensors travel without blocking."""
        tensors = {name: getattr(self, name) for name in ("values", "scale", "mask", "segments")}
        moved = {n: x.to(device, non_blocking=True) for n, x in tensors.items() if x is not None}
        return replace(self, **moved)

    def maps(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """(B, C, h, w) of each tap with channels last in memory, on the device where the rows are; zero where nothing
        is stored.

        Products are rounded once, from float32, so that they are the same on every device.
        """
        flat = self._dense(dtype) if self.mask is None else self._placed(self.mask, dtype)
        shaped = (x.view(self.images, h, w, self.channels) for x, (h, w) in zip(flat, self.sizes, strict=True))
        return tuple(x.permute(0, 3, 1, 2) for x in shaped)

    def _dense(self, dtype: torch.dtype) -> list[Tensor]:
        """(B, h * w, C) of each tap, each in one piece of memory."""
        cells = [h * w for h, w in self.sizes]
        values = self.values.view(self.images, -1, self.channels).split(cells, dim=1)
        if self.scale is None:
            return [x.to(dtype).contiguous() for x in values]
        scale = self.scale.float()
        per_tap = scale.split(1, dim=1) if scale.ndim == 3 else scale.view(self.images, -1, 1).split(cells, dim=1)
        return [_product(x, s, dtype) for x, s in zip(values, per_tap, strict=True)]

    def _placed(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(B * h * w, C) of each tap. The number of rows is known, so that no device is waited for."""
        assert self.scale is not None
        assert self.segments is not None
        rows, cells = len(self.values), [h * w for h, w in self.sizes]
        counts, shifts = self.segments
        segment = torch.repeat_interleave(counts, output_size=rows)
        bits = mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
        place = torch.nonzero_static(bits.flatten(), size=rows).squeeze(1) + shifts[segment]
        scale = self.scale.float()
        found = _product(self.values, scale.flatten(0, 1)[segment] if scale.ndim == 3 else scale, dtype)
        empty = found.new_zeros(self.images * sum(cells), self.channels)
        return empty.index_copy_(0, place, found).split([self.images * n for n in cells])


@lru_cache(maxsize=64)
def place_shifts(images: int, sizes: Sizes) -> tuple[int, ...]:
    """B * T numbers: what turns the number of a bit, counted over the masks of all images, into the row of its
    position when all images of the first tap stand before those of the second."""
    cells = np.array([h * w for h, w in sizes], np.int64)
    bits = -(-cells // 8) * 8
    image = np.arange(images, dtype=np.int64)[:, None]
    begin = images * (np.cumsum(cells) - cells) + image * cells
    return tuple((begin - image * bits.sum() - (np.cumsum(bits) - bits)).reshape(-1).tolist())


def stack(codec: Codec, encoded: Sequence[Encoded], shape: tuple[int, int, int], *, level: str) -> TapGroup:
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
    images, sizes = len(encoded), (shape[1:],)
    scale = mask = kept = None
    if codec.per is not None:
        scale = _joined([one.scale for one in encoded], torch.float16)
        scale = scale.view(images, 1, channels) if codec.per == "channel" else scale.view(-1, 1)
    if codec.sparse:
        mask = _joined([one.mask for one in encoded], torch.uint8).view(images, mask_bytes(codec, cells))
        kept = torch.tensor([[one.rows for one in encoded], place_shifts(images, sizes)])
    values = _joined([one.payload for one in encoded], codec.dtype).view(-1, channels)
    return TapGroup(images=images, channels=channels, sizes=sizes, values=values, scale=scale, mask=mask, segments=kept)


def _product(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` times float32 `scale`, rounded once, in one operation."""
    return torch.mul(values, scale, out=torch.empty(values.shape, dtype=dtype, device=values.device))


def _joined(parts: Sequence[memoryview | bytes], dtype: torch.dtype) -> Tensor:
    """The bytes of all parts as numbers of a type, copied."""
    joined = np.concatenate([np.frombuffer(part, np.uint8) for part in parts])
    return torch.from_numpy(joined.view(torch.empty(0, dtype=dtype).numpy().dtype))
