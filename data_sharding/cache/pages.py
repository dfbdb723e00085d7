"""Brings the pages of mapped files in before they are copied, so that the copy meets no page fault."""

import ctypes
import errno
import mmap
import os
import warnings
from collections.abc import Callable

import numpy as np

MADV_POPULATE_READ = 22
"""Linux 5.14: as if every page had been read, in one call. Neither Python nor pyarrow names it."""

Advise = Callable[[int, int, int], int]
"""(address, length, advice) -> 0, or the error number."""


def madvise(address: int, length: int, advice: int) -> int:
    """The C library's call; the interpreter's lock is free meanwhile."""
    library = ctypes.CDLL(None, use_errno=True)
    given = (ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))
    return ctypes.get_errno() if library.madvise(*given) else 0


class Pages:
    """Populates stretches of mapped memory, in the best way that this kernel knows."""

    def __init__(self, advise: Advise = madvise) -> None:
        self._advise = advise
        self.why_touching = ""
        """Why pages are read one by one here; empty where the kernel does it in one call."""

    def bring(self, mapped: np.ndarray) -> None:
        """Map all pages of (n,) uint8 memory, from disk where they are not in memory. A file that was cut meanwhile is
        left alone: whoever reads it next compares its size."""
        start = mapped.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        length = mapped.ctypes.data + len(mapped) - start
        if length == 0 or not len(mapped):
            return
        if not self.why_touching:
            self._advise(start, length, mmap.MADV_WILLNEED)  # large reads; population alone asks for small ones
            error = self._advise(start, length, MADV_POPULATE_READ)
            if error != errno.EINVAL:
                return
            self.why_touching = os.strerror(error)
            warnings.warn(
                f"this kernel does not populate mapped pages in one call ({self.why_touching}; Linux 5.14 does); "
                "they are touched one by one, which is slower and otherwise the same",
                stacklevel=2,
            )
        mapped[:: mmap.PAGESIZE].max()
