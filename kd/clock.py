"""Where the time of a step goes, without making the device wait for the stopwatch."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Exclusive time per section: entering an inner section pauses the outer one.

    On a GPU the marks are CUDA events, read once in `read`, so that measuring does not stall the queue.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[str | None, object]] = []
        self.passed = 0
        """Sections entered and left so far: how far this process is, by the same count on every rank."""

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what runs inside towards `name`."""
        self._mark(name)
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else None)

    def read(self) -> dict[str, float]:
        """Seconds per section since the last call."""
        if self._cuda and self._marks:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                spent[name] = spent.get(name, 0.0) + self._seconds(begin, end)
        self._marks = self._marks[-1:] if self._open else []
        return spent

    def _mark(self, running: str | None) -> None:
        self.passed += 1
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((running, event))
        else:
            self._marks.append((running, time.perf_counter()))

    def _seconds(self, begin: object, end: object) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return begin.elapsed_time(end) / 1000
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
