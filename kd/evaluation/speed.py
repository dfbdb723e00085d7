"""How large and how fast a detector is, from pixels to final boxes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_sharding.batch import Geometry
from kd.backbones.base import evaluating
from kd.detectors.base import Detections, Detector

_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one image on one device."""

    parameters: int
    """All of them, trained or frozen; normalisers' frozen statistics are buffers and not counted."""
    milliseconds: float
    """Median time per image at batch 1: normalising, forward, decoding and non-maximum suppression."""
    gflops: float
    """10^9 floating point operations of convolutions and matrix products (a multiply-add is two)."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of something that was run again and again."""

    first: float
    """The first run: compilation and caches too. In none of the other numbers."""
    median: float
    fastest: float
    slowest: float


def measure(detector: Detector, canvas: tuple[int, int], repeats: int = 20) -> Speed:
    """Run `detector`, where it is, on one noise image of (H, W) `canvas`.

    Decoding time depends on how many locations pass the score threshold: measure trained weights.
    """
    _check(repeats)
    device = detector.mean.device
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, *canvas), dtype=torch.uint8, generator=noise).to(device)
    geometry = Geometry(canvas, torch.tensor([canvas], device=device))
    with torch.no_grad(), evaluating(detector):
        with FlopCounterMode(display=False) as flops:
            _detect(detector, images, geometry)
        found = latency(lambda: _detect(detector, images, geometry), device, repeats)
    return Speed(
        parameters=sum(p.numel() for p in detector.parameters()),
        milliseconds=1000 * found.median,
        gflops=flops.get_total_flops() / 1e9,
    )


def latency(work: Callable[[], object], device: torch.device, repeats: int = 20) -> Latency:
    """Time `work` `repeats` times after some runs to warm up, waiting for the GPU on both sides of each."""
    _check(repeats)
    times = [_timed(work, device) for _ in range(_WARM_UP + repeats)]
    counted = times[_WARM_UP:]
    return Latency(first=times[0], median=statistics.median(counted), fastest=min(counted), slowest=max(counted))


def _check(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def _detect(detector: Detector, images: torch.Tensor, geometry: Geometry) -> list[Detections]:
    taps = detector.features(detector.normalise(images, geometry))
    return detector.detect(detector.predict(taps.pyramid, geometry), geometry)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
