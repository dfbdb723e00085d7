"""How long a rank spends in collectives: moving numbers, and waiting for the other ranks to come.

Torch offers no hook for this that costs nothing, so its functions are replaced by themselves between two looks at a
stopwatch, for as long as somebody counts. On a GPU the looks are CUDA events on the stream that waits: what is
counted there is what communication holds up, not what runs beside the backward.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

CALLS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
    "all_gather_object", "barrier",
)  # fmt: skip
KEPT = ("all_gather_function", "reduce_scatter_function")
"""DeepSpeed's backend looks these two up once and keeps them."""


class Traffic:
    """Seconds in collectives since the last `read`."""

    def __init__(
        self, device: torch.device | None = None, now: Callable[[], float] = time.perf_counter, calls: Any = dist
    ) -> None:
        """`calls`: who has the collectives as attributes; `now`: the stopwatch of a processor."""
        self._cuda = device is not None and device.type == "cuda"
        self._now, self._calls = now, calls
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def counted(self, kept: object | None = None) -> Iterator[None]:
        """Count what is called inside. `kept`: DeepSpeed's backend, which has looked some functions up before."""
        places = [(self._calls, name) for name in CALLS if hasattr(self._calls, name)]
        places += [(kept, name) for name in KEPT if hasattr(kept, name)]
        plain = [getattr(owner, name) for owner, name in places]
        for (owner, name), function in zip(places, plain, strict=True):
            setattr(owner, name, self._timed(function))
        try:
            yield
        finally:
            for (owner, name), function in zip(places, plain, strict=True):
                setattr(owner, name, function)

    def read(self) -> float:
        """Seconds since the last call. On a GPU it waits for the device."""
        found, self._seconds = self._seconds, 0.0
        if self._events:
            torch.cuda.synchronize()
            found += sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
            self._events = []
        return found

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **settings: Any) -> Any:
            with self._span():
                handle = function(*given, **settings)
            return _Handle(handle, self._span) if hasattr(handle, "wait") else handle

        return timed

    @contextmanager
    def _span(self) -> Iterator[None]:
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = self._now()
            yield
            self._seconds += self._now() - began


class _Handle:
    """A collective under way: what its caller waits for it counts too."""

    def __init__(self, handle: Any, span: Callable[[], Any]) -> None:
        self._handle, self._span = handle, span

    def wait(self, *given: Any, **settings: Any) -> Any:
        with self._span():
            return self._handle.wait(*given, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
