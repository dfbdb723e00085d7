"""The same numbers from the same inputs, without the price that torch asks for it by default."""

import os

import torch


def repeatable(on: bool) -> None:
    """Let torch choose algorithms that give the same bits every time, or not (on a GPU they may be slower).

    With them torch also fills all memory that an operator is about to write with NaN first, to show programs that read
    what was never written; that is a quarter of a step on a CPU (MobileNetV2, 128 px: 0.36 s, without 0.28 s). Ours
    read none: `tests/cluster/test_repeatable.py` runs a step with it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (an alias there)
    torch.backends.cudnn.benchmark = not on
