"""A function on the ranks of a world of gloo processes that begin anew each time, so that memory can be compared."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_sharding.world import World

PATIENCE = timedelta(hours=1)
"""Before a rank that waits for another gives up: a busy machine is slow, not dead."""
PRELOADED = ["torch", "torchvision", "benchmarks.two_processes", "benchmarks.zero_case"]


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on every rank; plain results in rank order. RuntimeError where a rank dies."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    context = get_context("forkserver")  # imports once, and every rank begins as it was then
    context.set_forkserver_preload(PRELOADED)
    meeting = Path(tempfile.mkdtemp(prefix="minnow_world_")) / "meeting"
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, str(meeting), there, function, arguments))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError("a rank has died; what it said stands above") from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    rank: int, size: int, meeting: str, pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
    pipe.send(function(World(rank=rank, size=size), *arguments))
