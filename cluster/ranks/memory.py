"""The most memory that a worker held: of its GPU where it has one, else of its process."""

from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
PEAK = "5"
"""What Linux takes to mean: forget the highest resident size so far."""


def forget_peak(device: torch.device) -> None:
    """Count from now on: Ray may hand a worker a process that has done other things."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text(PEAK)
    except OSError:  # a container may forbid it; the peak then counts from the process's start
        return


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes since `forget_peak`: what torch allocated on a GPU, else the process's resident size, whose
    allocator keeps what is freed. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    told = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(told[0]) if told else None
