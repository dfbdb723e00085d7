"""Copies the rows of a batch out of mapped files into one piece of memory: in one call for each group of taps, or,
where samples are checked, sample by sample and hashed on the way.

Whatever is interpreted here for each sample costs as much as a good part of the copy of a sparse one, so nothing is.
Letters: B samples, T taps of a group, C their channels, R stored positions of all samples and taps.
"""

import struct
from collections.abc import Collection, Sequence
from itertools import accumulate

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_sharding.cache.buffers import ALIGNED, BatchBuffers
from data_sharding.cache.groups import Group
from data_sharding.cache.rows import StoredRow
from data_sharding.codecs.stored import Sizes, TapGroup, place_shifts

CHUNK = 512 * 2**10
"""Bytes that are hashed right after they were copied, while the processor core's own cache still holds them: memory is
then read once for both."""


class BatchCopy:
    """The memory of one batch. In it lie, one after the other, the scales of all samples for each group, then the
    masks, then the values, then what is counted in each sparse group."""

    def __init__(self, rows: Sequence[StoredRow], groups: Sequence[Group], sizes: Sizes, buffers: BatchBuffers) -> None:
        """`rows` share a canvas, on which the taps have these `sizes` (h, w)."""
        self._rows, self._groups, self._sizes = rows, groups, sizes
        self._columns = tuple(zip(*[row.parts for row in rows], strict=True))
        """Where each stretch of the batch comes from, sample by sample."""
        self._starts, lengths, end = list[int](), list[int](), 0
        for column in self._columns:
            self._starts.append(end)
            lengths.append(sum(map(len, column)))
            end = -(-(end + lengths[-1]) // ALIGNED) * ALIGNED
        for group in groups:
            self._starts.append(end)
            end += group.codec.sparse * -(-16 * len(rows) * group.count // ALIGNED) * ALIGNED
        self._buffer = buffers.take(end)
        self._memory = self._buffer.numpy()
        whole = zip(self._columns, self._starts, lengths, strict=False)  # what is behind comes from no file
        found = [(column, self._memory[start : start + length]) for column, start, length in whole if length]
        # Backwards: while the values are copied, which takes longest, another thread can prepare the next batch.
        self._whole = found[::-1]

    def copy(self, checked: Collection[int] = ()) -> list[tuple[int, int]]:
        """Copy all samples. Of those whose numbers are in `checked`: the number and the checksum of what now lies in
        the batch."""
        if checked:
            return self._copy_singly(checked)
        for column, out in self._whole:
            # numpy copies read-only mappings without a warning and without holding the interpreter's lock.
            np.concatenate(column, out=out)
        return []

    def taps(self) -> tuple[TapGroup, ...]:
        """The taps over the batch's memory, in the order of the groups, to be read once all samples were copied."""
        return tuple(self._group(number, group) for number, group in enumerate(self._groups))

    def _copy_singly(self, checked: Collection[int]) -> list[tuple[int, int]]:
        begins = [
            list(accumulate(map(len, column), initial=start))
            for column, start in zip(self._columns, self._starts, strict=False)
        ]
        found = []
        for number, row in enumerate(self._rows):
            hasher = row.hasher() if number in checked else None
            for column, begin in zip(self._columns, begins, strict=True):
                self._copy_part(column[number], begin[number], hasher)
            if hasher is not None:
                found.append((number, hasher.intdigest()))
        return found

    def _copy_part(self, source: np.ndarray, start: int, hasher: "xxhash.xxh3_64 | None") -> None:
        for at in range(0, len(source), CHUNK):
            piece = source[at : at + CHUNK]
            copied = self._memory[start + at : start + at + len(piece)]
            np.copyto(copied, piece)
            if hasher is not None:
                hasher.update(copied.data)

    def _group(self, number: int, group: Group) -> TapGroup:
        images, taps, channels, groups = len(self._rows), group.count, group.channels, len(self._groups)
        sizes, codec = self._sizes[group.first : group.end], group.codec
        kept = sum(map(len, self._columns[2 * groups + number])) // (channels * codec.dtype.itemsize)
        scale = mask = segments = None
        if codec.per == "channel":
            scale = self._tensor(number, torch.float16, (images, taps, channels), (taps * channels, channels, 1))
        elif codec.per == "position":
            scale = self._tensor(number, torch.float16, (kept, 1), (1, 1))
        if codec.sparse:
            length = len(self._columns[groups + number][0])
            mask = self._tensor(groups + number, torch.uint8, (images, length), (length, 1))
            segments = self._segments(3 * groups + number, group, sizes)
        values = self._tensor(2 * groups + number, codec.dtype, (kept, channels), (channels, 1))
        return TapGroup(
            images=images, channels=channels, sizes=sizes, values=values, scale=scale, mask=mask, segments=segments
        )

    def _segments(self, number: int, group: Group, sizes: Sizes) -> Tensor:
        counts = [kept for row in self._rows for kept in row.rows[group.first : group.end]]
        shifts, count = place_shifts(len(self._rows), sizes), len(counts)
        struct.pack_into(f"{2 * count}q", self._memory.data, self._starts[number], *counts, *shifts)
        return self._tensor(number, torch.int64, (2, count), (count, 1))

    def _tensor(self, number: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        """One stretch of the batch as numbers: two operations, where slices and views would be four."""
        return self._buffer.view(dtype).as_strided(shape, strides, self._starts[number] // dtype.itemsize)
