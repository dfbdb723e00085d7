"""Copies the rows of a batch out of mapped files into one piece of memory: each byte once, hashed on its way.

Shape letters: B samples, C channels of a tap, R stored positions of a tap of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_sharding.cache_buffers import ALIGNED, BatchBuffers
from data_sharding.cache_key import CacheKey
from data_sharding.cache_rows import StoredRow
from data_sharding.codecs import StoredTap, mask_bytes, row_bytes, scale_count

CHUNK = 256 * 2**10
"""Bytes that are hashed right after they were copied, while the processor core's own cache still holds them: memory is
then read once for both."""


@dataclass(frozen=True)
class _Stretch:
    """Where the values, the scales or the masks of one tap lie in the batch's memory, sample by sample."""

    starts: list[int]
    sizes: list[int]

    @property
    def end(self) -> int:
        return self.starts[-1] + self.sizes[-1]


class BatchCopy:
    """The memory of one batch, into which its samples are copied one after the other."""

    def __init__(self, rows: Sequence[StoredRow], key: CacheKey, buffers: BatchBuffers) -> None:
        """`rows` share a canvas."""
        self.rows, self.key = rows, key
        self.sizes = key.layout.sizes(rows[0].canvas[:2])
        self.kept = list(zip(*(row.rows for row in rows), strict=True))
        taps = list(zip(key.coding, key.channels, self.kept, self.sizes, strict=True))
        self._end = 0
        self._values = [self._stretch([n * row_bytes(c, channels) for n in kept]) for c, channels, kept, _ in taps]
        self._scales = [self._stretch([2 * scale_count(c, channels, n) for n in kept]) for c, channels, kept, _ in taps]
        self._masks = [self._stretch([mask_bytes(c, h * w)] * len(rows)) for c, _, _, (h, w) in taps]
        self._buffer = buffers.take(max(-(-self._end // ALIGNED), 1) * ALIGNED)
        self._memory = self._buffer.numpy()

    def copy(self, number: int, *, check: bool) -> int | None:
        """Copy sample `number`. With `check` the checksum of what now lies in the batch, else None."""
        row = self.rows[number]
        hasher = row.hasher() if check else None
        for source, stretches in ((row.scales, self._scales), (row.masks, self._masks), (row.values, self._values)):
            if len(source):
                self._copy(source, stretches, number, hasher)
        return None if hasher is None else hasher.intdigest()

    def taps(self) -> tuple[StoredTap, ...]:
        """The taps over the batch's memory, in the layout's order."""
        typed = {t: self._buffer.view(t) for t in {torch.uint8, torch.float16, *(c.dtype for c in self.key.coding)}}
        return tuple(self._tap(number, typed) for number in range(len(self.sizes)))

    def _stretch(self, sizes: list[int]) -> _Stretch:
        start = -(-self._end // ALIGNED) * ALIGNED
        found = _Stretch(list(accumulate(sizes[:-1], initial=start)), sizes)
        self._end = found.end
        return found

    def _copy(
        self, source: np.ndarray, stretches: list[_Stretch], number: int, hasher: "xxhash.xxh3_64 | None"
    ) -> None:
        at, memory = 0, self._memory
        for stretch in stretches:
            size, start = stretch.sizes[number], stretch.starts[number]
            if hasher is None:
                # numpy copies a read-only mapping without a warning and without holding the interpreter's lock.
                np.copyto(memory[start : start + size], source[at : at + size])
            else:
                for offset in range(0, size, CHUNK):
                    end = min(offset + CHUNK, size)
                    piece = memory[start + offset : start + end]
                    np.copyto(piece, source[at + offset : at + end])
                    hasher.update(piece.data)
            at += size

    def _tap(self, number: int, typed: dict[torch.dtype, Tensor]) -> StoredTap:
        coding, channels, (height, width) = self.key.coding[number], self.key.channels[number], self.sizes[number]
        count, positions = len(self.rows), sum(self.kept[number])

        def view(stretch: _Stretch, dtype: torch.dtype, height: int, width: int) -> Tensor:
            # One operation instead of three: a sparse batch is copied in the time of a few dozen.
            return typed[dtype].as_strided((height, width), (width, 1), stretch.starts[0] // dtype.itemsize)

        values, scale, mask = view(self._values[number], coding.dtype, positions, channels), None, None
        if coding.per == "channel":
            scale = view(self._scales[number], torch.float16, count, channels).unsqueeze(1)
        elif coding.per == "position":
            scale = view(self._scales[number], torch.float16, positions, 1)
        if coding.sparse:
            mask = view(self._masks[number], torch.uint8, count, mask_bytes(coding, height * width))
        return StoredTap(shape=(count, channels, height, width), values=values, scale=scale, mask=mask)
