"""Work that runs ahead of its consumer in threads, in order and bounded."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T], Iterator[T]):
    """The results of work that has been handed out, in order, with at most `depth` pieces in flight.

    Taking the next piece from `started` starts it (it submits to a pool) and gives a function that waits for it.
    """

    def __init__(self, started: Iterator[Callable[[], T]], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"expected at least one piece of work in flight, got {depth}")
        self.wait_seconds = 0.0
        """How long the consumer has waited so far: the time that data cost the training."""
        self._started, self._depth = started, depth
        self._flying: deque[Callable[[], T]] = deque()

    def __next__(self) -> T:
        began = time.perf_counter()
        self._start_more()
        if not self._flying:
            raise StopIteration
        result = self._flying.popleft()()
        self._start_more()
        self.wait_seconds += time.perf_counter() - began
        return result

    def _start_more(self) -> None:
        while len(self._flying) < self._depth:
            wait = next(self._started, None)
            if wait is None:
                return
            self._flying.append(wait)
