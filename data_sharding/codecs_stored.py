"""One tap of a whole batch as it is stored: what travels to the training device, and its decoding there.

The loader only copies rows; the device multiplies and places them, for all images of a batch in one operation each.
Shape letters: B images, C channels, h x w cells, R rows of all images: B * h * w, or fewer where codecs are sparse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_sharding.codecs_base import Codec, CodecError, Encoded, mask_bytes, scale_count

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a CPU tensor of a shape and type, in page-locked memory where that serves."""


@dataclass(frozen=True, kw_only=True)
class StoredTap:
    """One tap of B images, of one codec."""

    shape: tuple[int, int, int, int]
    """(B, C, h, w) of the maps."""
    values: Tensor
    """(R, C) fp16, fp32 or int8."""
    scale: Tensor | None = None
    """float16: (B, 1, C) per channel or (R, 1) per position, for int8 values."""
    place: Tensor | None = None
    """(R,) int64: each row's position among all B * h * w; None where every position is stored."""

    def to(self, device: torch.device) -> "StoredTap":
        """The same on `device`; pinned tensors travel without blocking."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        values = self.values.to(device, non_blocking=True)
        return replace(self, values=values, scale=move(self.scale), place=move(self.place))

    def maps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, h, w) with channels last in memory, on the device where the rows are; zero where nothing is stored.

        Products are rounded once, from float32, so that they are the same on every device.
        """
        images, channels, height, width = self.shape
        rows = self._decoded(dtype)
        if self.place is not None:
            empty = rows.new_zeros(images * height * width, channels)
            rows = empty.index_copy_(0, self.place, rows)
        return rows.view(images, height, width, channels).permute(0, 3, 1, 2)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        """(R, C) features."""
        if self.scale is None:
            return self.values.to(dtype)
        scale, values = self.scale.float(), self.values
        cells = self.shape[2] * self.shape[3]
        if scale.ndim == 3 and self.place is not None:
            scale = scale[:, 0][self.place // cells]
        elif scale.ndim == 3:
            values = values.view(len(scale), cells, -1)
        return torch.mul(values, scale).to(dtype).view(self.values.shape)


def stack(
    codec: Codec,
    encoded: Sequence[Encoded],
    shape: tuple[int, int, int],
    *,
    level: str,
    allocate: Allocate | None = None,
) -> StoredTap:
    """One (C, h, w) tap of several images, copied into one piece of memory on the CPU, nothing decoded.

    Raises CodecError where what is stored cannot be a tap of that shape.
    """
    channels, cells = shape[0], shape[1] * shape[2]
    new: Allocate = allocate or (lambda size, dtype: torch.empty(size, dtype=dtype))
    places = [_places(codec, one, cells, level) for one in encoded]
    values = new((sum(one.rows for one in encoded), channels), codec.dtype)
    _copy([one.payload for one in encoded], [one.rows * channels for one in encoded], values, codec.name, level)
    scale = place = None
    if codec.per is not None:
        counts = [scale_count(codec, channels, one.rows) for one in encoded]
        per_channel = codec.per == "channel"
        scale = new((len(encoded), 1, channels) if per_channel else (len(values), 1), torch.float16)
        _copy([one.scale for one in encoded], counts, scale, "scale", level)
    if codec.sparse:
        place = new((len(values),), torch.int64)
        np.concatenate([p + i * cells for i, p in enumerate(places)], out=place.numpy())
    return StoredTap(shape=(len(encoded), *shape), values=values, scale=scale, place=place)


def _copy(parts: Sequence[memoryview | bytes], counts: Sequence[int], out: Tensor, what: str, level: str) -> None:
    """Fill `out` with `counts` values of each part."""
    flat = out.view(-1).numpy()
    start = 0
    for part, count in zip(parts, counts, strict=True):
        if len(part) != count * flat.itemsize:
            raise CodecError(
                f"tap {level!r}: expected {count} {what} values of {flat.itemsize} bytes, found {len(part)} bytes"
            )
        # numpy copies a read-only mapping without a warning and without holding the interpreter's lock.
        np.copyto(flat[start : start + count], np.frombuffer(part, flat.dtype))
        start += count


def _places(codec: Codec, one: Encoded, cells: int, level: str) -> np.ndarray:
    """(P,) int64: which of an image's positions are stored."""
    if len(one.mask) != mask_bytes(codec, cells):
        raise CodecError(
            f"tap {level!r}: codec {codec.name} needs a mask of {mask_bytes(codec, cells)} bytes for {cells} "
            f"positions, found {len(one.mask)}"
        )
    if not codec.sparse:
        if one.rows != cells:
            raise CodecError(f"tap {level!r}: codec {codec.name} keeps all {cells} positions, found {one.rows}")
        return np.zeros(0, np.int64)
    kept = np.flatnonzero(np.unpackbits(np.frombuffer(one.mask, np.uint8), count=cells, bitorder="little"))
    if len(kept) != one.rows:
        raise CodecError(f"tap {level!r}: the mask names {len(kept)} of {cells} positions, {one.rows} are stored")
    return kept
