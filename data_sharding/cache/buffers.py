"""Memory for the batches of a teacher cache: used again as soon as nobody holds the batch that lay in it.

Fresh memory costs a page fault per page, as much as reading the features themselves. Who owns a buffer is settled by
what Python counts anyway: it is lent out with a tensor, and comes back when the last tensor over it, any view
included, is gone. So a batch in use is never written over, however many a prefetch keeps in flight.
"""

import threading
import weakref
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64
"""Parts of a buffer begin at multiples of this many bytes."""


class BatchBuffers:
    """Lends CPU memory to one batch at a time; safe to use from several threads."""

    def __init__(self, *, pin: bool = False, spare: int = 4) -> None:
        """`pin`: page-locked memory, which only CUDA can allocate. `spare`: so many returned buffers are kept."""
        if spare < 1:
            raise ValueError(f"expected at least one spare buffer, got {spare}")
        self.pin, self.spare = pin, spare
        self._free: list[np.ndarray] = []
        self._returned: SimpleQueue[np.ndarray] = SimpleQueue()  # its `put` may be called while this thread is in it
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """(size,) uint8, its content arbitrary; the caller's until the last tensor over it is gone."""
        if self.pin:
            # torch keeps page-locked memory for reuse too, and waits for the copies to the GPU that still read it.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        memory = self._fitting(size)
        if memory is None:
            memory = np.empty(1 << max(size - 1, 0).bit_length(), np.uint8)  # pages that are never touched cost nothing
        lent = memory[:size]
        weakref.finalize(lent, self._returned.put, memory).atexit = False
        return torch.from_numpy(lent)

    def _fitting(self, size: int) -> np.ndarray | None:
        """The smallest spare buffer that is large enough; the longest unused ones are let go."""
        with self._lock:
            while not self._returned.empty():
                self._free.append(self._returned.get())
            del self._free[: -self.spare]
            found = min((b for b in self._free if len(b) >= size), key=len, default=None)
            self._free = [b for b in self._free if b is not found]
            return found
