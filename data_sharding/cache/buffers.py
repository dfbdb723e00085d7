"""Memory for the batches of a teacher cache: used again as soon as nobody holds the batch that lay in it.

Fresh memory costs a page fault per page, as much as reading the features themselves. Who owns a buffer is settled by
what Python counts anyway: a tensor over it holds it, and it is free when the last tensor over it, any view included,
is gone. So a batch in use is never written over, however many a prefetch keeps in flight.
"""

import sys
import threading

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64
"""Parts of a buffer begin at multiples of this many bytes, as those of an Arrow file do: copies are then 2 % faster."""
UNHELD = 2
"""What Python counts of a buffer that nobody holds: the pool's list, and the question itself."""


class BatchBuffers:
    """Lends CPU memory to one batch at a time; safe to use from several threads."""

    def __init__(self, *, pin: bool = False, spare: int = 4) -> None:
        """`pin`: page-locked memory, which only CUDA can allocate. `spare`: so many buffers are kept for later."""
        if spare < 1:
            raise ValueError(f"expected at least one spare buffer, got {spare}")
        self.pin, self.spare = pin, spare
        self._all: list[np.ndarray] = []
        """The lent ones and the spare ones, the latest lent last."""
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """(size,) uint8, its content arbitrary; the caller's until the last tensor over it is gone."""
        if self.pin:
            # torch keeps page-locked memory for reuse too, and waits for the copies to the GPU that still read it.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            return torch.from_numpy(self._fitting(size)[:size])

    def _fitting(self, size: int) -> np.ndarray:
        """The smallest spare buffer that is large enough, or a new one; the longest unused ones are let go."""
        spare = [number for number in range(len(self._all)) if sys.getrefcount(self._all[number]) == UNHELD]
        fitting = [number for number in spare if len(self._all[number]) >= size]
        if fitting:
            found = self._all.pop(min(fitting, key=lambda number: len(self._all[number])))
        else:
            found = _aligned(1 << max(size - 1, 0).bit_length())  # pages that are never touched cost nothing
            for number in reversed(spare[: max(0, len(spare) - self.spare + 1)]):
                del self._all[number]
        self._all.append(found)
        return found


def _aligned(size: int) -> np.ndarray:
    """(size,) uint8 at an address that is a multiple of ALIGNED, owner of itself in the eyes of its slices."""
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    # Slices of a slice refer to the first array: through a memoryview, they refer to this one.
    return np.frombuffer(memory.data[start : start + size], np.uint8)
