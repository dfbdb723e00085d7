"""Processes that stay alive for the whole test session and run functions as the ranks of one world, mostly two.

Starting processes and importing DeepSpeed takes seconds, a case inside them a fraction of one. A function gets the
world first, must be importable by name, and may return whatever `torch.save` takes.
"""

import functools
import io
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_sharding.world import World

SIZE = 2
PATIENCE = 120.0
"""Seconds until a case counts as hung; the ranks give each other half of it."""


class Ranks:
    """The parent's end. A rank that raises or hangs ends all: what it left half done would disturb later cases, which
    find new processes."""

    def __init__(self, size: int = SIZE, patience: float = PATIENCE) -> None:
        """`patience`: seconds until a case counts as hung."""
        self._size, self._patience = size, patience
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(world, *arguments)` on every rank; the results in rank order."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [self._answer(rank, pipe) for rank, pipe in enumerate(self._pipes)]
        wrong = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if wrong:
            self.close()
            raise AssertionError("\n".join(wrong))
        return [torch.load(io.BytesIO(data), weights_only=False) for _, data in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = get_context("spawn")
        meeting = Path(tempfile.mkdtemp(prefix="minnow_ranks_")) / "meeting"
        for rank in range(self._size):
            here, there = context.Pipe()
            serving = (rank, self._size, str(meeting), there, self._patience)
            process = context.Process(target=_serve, args=serving, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _answer(self, rank: int, pipe: Connection) -> tuple[str, bytes]:
        try:
            return pipe.recv() if pipe.poll(self._patience) else (f"no answer within {self._patience} s", b"")
        except EOFError:
            return f"died with exit code {self._processes[rank].exitcode}", b""


@functools.cache
def ranks(size: int = SIZE) -> Ranks:
    """The one group of so many processes of this session; it dies with it."""
    return Ranks(size)


def _serve(rank: int, size: int, meeting: str, pipe: Connection, patience: float) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
        OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=patience / 2)
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(function, World(rank=rank, size=size), arguments))


def _run(function: Callable[..., Any], world: World, arguments: tuple[Any, ...]) -> tuple[str, bytes]:
    try:
        buffer = io.BytesIO()
        torch.save(function(world, *arguments), buffer)
        return "", buffer.getvalue()
    except Exception:
        return traceback.format_exc(), b""
