"""A live teacher too large for one device: ZeRO-3 inference.

Every rank keeps a part of each weight of the backbone and the pyramid; before a layer computes, all ranks give it its
weights, and take them away behind it. Ranks therefore wait for each other in every layer, and all must look equally
often. The head stays whole: it is small, and methods ask it in ways of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.batch import Taps
from kd.detectors.base import Detector

SHARED_OUT = ("backbone", "fpn")
"""The parts of a detector whose weights are cut."""
WHOLE_BELOW = 100_000
"""Weights of fewer numbers are on every rank: normalisers, biases, small convolutions."""
AHEAD = 20
"""A twentieth of the teacher is fetched before its layers are reached, at least its largest weight."""


def share_out(detector: Detector, device: torch.device, whole_below: int = WHOLE_BELOW) -> Callable[[Tensor], Taps]:
    """Cut the weights of a frozen detector's features over all ranks, which call this together, one weight at a time
    on the device; the way to compute its features from now on, in place of `detector.features`. DeepSpeed is started.
    """
    import deepspeed

    parts = _Features(detector.eval().requires_grad_(False)).eval()
    for buffer in parts.buffers():
        buffer.data = buffer.data.to(device)
    detector.mean, detector.std = detector.mean.to(device), detector.std.to(device)
    settings = _settings(parts, whole_below)
    deepspeed.zero.Init(module=parts, config_dict_or_path=settings)
    engine: Any = deepspeed.initialize(model=parts, config=settings, dist_init_required=False)[0]

    def features(images: Tensor) -> Taps:
        c5, *pyramid = engine(images)
        return Taps(c5, tuple(pyramid))

    return features


def shard_bytes(detector: Detector) -> int:
    """What this rank keeps of the weights between two looks."""
    found = 0
    for parameter in detector.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        found += parameter.nbytes + (0 if shard is None else shard.nbytes)
    return found


class _Features(nn.Module):
    """A detector's features as a module of their own: what DeepSpeed may hook takes and returns tensors alone."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({n: part for n, part in detector.named_children() if n in SHARED_OUT})
        self._look = detector.features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        taps = self._look(images)
        assert taps.c5 is not None
        return (taps.c5, *taps.pyramid)


def _settings(parts: nn.Module, whole_below: int) -> dict[str, Any]:
    sizes = [parameter.numel() for parameter in parts.parameters()]
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; it means nothing here
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,  # it would replace torch's for the whole process, the student's too
            "stage3_param_persistence_threshold": whole_below,
            "stage3_prefetch_bucket_size": max(*sizes, sum(sizes) // AHEAD),
        },
        "wall_clock_breakdown": False,
    }
