"""Copies the rows of a batch out of mapped files into one piece of memory: each byte once, hashed on its way.

A sparse sample is copied in the time of some dozen interpreted lines: what is short goes through tables, so that
interpreted work per sample and tap is left for the values alone. Shape letters: B samples, C channels of a tap, R
stored positions of a tap of all samples.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_sharding.cache.buffers import ALIGNED, BatchBuffers
from data_sharding.cache.rows import StoredRow
from data_sharding.codecs.catalogue import Codec, StoredTap

CHUNK = 256 * 2**10
"""Bytes that are hashed right after they were copied, while the processor core's own cache still holds them: memory is
then read once for both."""


class BatchCopy:
    """The memory of one batch, into which its samples are copied one after the other."""

    def __init__(
        self,
        rows: Sequence[StoredRow],
        coding: Sequence[Codec],
        channels: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        buffers: BatchBuffers,
    ) -> None:
        """`rows` share a canvas, on which the taps have these `channels` and `sizes` (h, w)."""
        self._rows, self._coding, self._channels, self._sizes = rows, coding, channels, sizes
        self._kept = [sum(kept) for kept in zip(*(row.rows for row in rows), strict=True)]
        lengths = [[row.lengths[kind] for row in rows] for kind in range(3)]
        starts, end = [], 0
        for by_row in lengths:
            starts.append([])
            for of_tap in zip(*by_row, strict=True):
                begins = list(accumulate(of_tap, initial=-(-end // ALIGNED) * ALIGNED))
                end = begins[-1]
                starts[-1].append(begins)
        self._scales, self._masks, self._values = starts
        self._buffer = buffers.take(max(-(-end // ALIGNED), 1) * ALIGNED)
        self._memory = self._buffer.numpy()
        # Scales per channel and masks are equally long in every sample: one row of a table each, placed all at once.
        self._tables = [
            np.empty((len(rows), sum(by_row[0])), np.uint8) if by_row.count(by_row[0]) == len(rows) else None
            for by_row in lengths[:2]
        ]

    def copy(self, number: int, *, check: bool) -> int | None:
        """Copy sample `number`. With `check` the checksum of what now lies in the batch, else None."""
        row = self._rows[number]
        hasher = row.hasher() if check else None
        short = ((row.scales, self._scales, row.lengths[0]), (row.masks, self._masks, row.lengths[1]))
        for (source, starts, lengths), table in zip(short, self._tables, strict=True):
            if table is None:
                self._copy(source, starts, lengths, number, hasher)
            elif len(source):
                table[number] = source
                if hasher is not None:
                    hasher.update(table[number].data)
        self._copy(row.values, self._values, row.lengths[2], number, hasher)
        return None if hasher is None else hasher.intdigest()

    def taps(self) -> tuple[StoredTap, ...]:
        """The taps over the batch's memory, in the layout's order, once all samples were copied."""
        for table, starts in zip(self._tables, (self._scales, self._masks), strict=True):
            if table is not None and table.shape[1]:
                self._place(table, starts)
        typed = {dtype: self._buffer.view(dtype) for dtype in {torch.float16, *(c.dtype for c in self._coding)}}
        return tuple(self._tap(number, typed) for number in range(len(self._sizes)))

    def _copy(
        self,
        source: np.ndarray,
        starts: list[list[int]],
        lengths: tuple[int, ...],
        number: int,
        hasher: "xxhash.xxh3_64 | None",
    ) -> None:
        at, memory = 0, self._memory
        for begins, length in zip(starts, lengths, strict=True):
            start = begins[number]
            if hasher is None:
                # numpy copies a read-only mapping without a warning and without holding the interpreter's lock.
                np.copyto(memory[start : start + length], source[at : at + length])
            else:
                for offset in range(0, length, CHUNK):
                    end = min(offset + CHUNK, length)
                    piece = memory[start + offset : start + end]
                    np.copyto(piece, source[at + offset : at + end])
                    hasher.update(piece.data)
            at += length

    def _place(self, table: np.ndarray, starts: list[list[int]]) -> None:
        """From sample by sample to tap by tap."""
        at = 0
        for begins in starts:
            length = begins[1] - begins[0]
            self._memory[begins[0] : begins[-1]].reshape(len(table), length)[:] = table[:, at : at + length]
            at += length

    def _tap(self, number: int, typed: dict[torch.dtype, Tensor]) -> StoredTap:
        coding, channels, kept = self._coding[number], self._channels[number], self._kept[number]
        count, (height, width) = len(self._rows), self._sizes[number]
        scale = mask = None
        # One operation on a tensor for each part, not one for its place, its type and its shape.
        start = self._values[number][0] // coding.dtype.itemsize
        values = typed[coding.dtype].as_strided((kept, channels), (channels, 1), start)
        if coding.per is not None:
            shape = (count, 1, channels) if coding.per == "channel" else (kept, 1)
            strides = (channels, channels, 1) if coding.per == "channel" else (1, 1)
            scale = typed[torch.float16].as_strided(shape, strides, self._scales[number][0] // 2)
        if coding.sparse:
            begins = self._masks[number]
            length = begins[1] - begins[0]
            mask = self._buffer.as_strided((count, length), (length, 1), begins[0])
        return StoredTap(shape=(count, channels, height, width), values=values, scale=scale, mask=mask)
