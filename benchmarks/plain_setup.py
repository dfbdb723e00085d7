"""What one training run is, without recipes: the values that benchmarks and experiments are set up with."""

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_sharding.pack import pack
from data_sharding.record import Category
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable
from kd.blocks.align import Rule
from kd.detectors.base import Detector
from kd.engine import Precision
from kd.methods.base import MethodConfig
from kd.optimise import OptimConfig
from kd.plugins import plugin

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True, kw_only=True)
class Split:
    """A packed split and its views."""

    dataset: PackedDataset
    views: ViewTable


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """Who teaches, and how."""

    folder: Path
    """What `kd.student.save` wrote."""
    factor: int = 2
    align: Rule = "shift"
    cached: bool = True
    codec: str = "fp16"
    """Of all taps; `int8` and `sparse` are measured on this teacher, as in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run. Everything that is trained or drawn depends on these values alone."""

    data: Any
    """A data set plug-in's Config; it names the plug-in."""
    storage: Path
    """Where packed splits and caches lie; shared by runs."""
    views: ViewConfig
    evaluation_views: ViewConfig
    detector: Any
    """A detector plug-in's Config: who is trained."""
    optim: OptimConfig
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    teaching: Teaching | None = None
    seed: int = 0
    precision: Precision = "fp32"
    device: str = "cpu"
    threads: int = 1
    """Of the loader."""
    max_dets: tuple[int, ...] = (1, 10, 100)
    evaluation_batch: int = 16
    factor: int = 1
    """Resolution of the final evaluation, as a multiple of `evaluation_views`."""


def open_split(setup: Setup, split: str, views: ViewConfig) -> Split:
    """Pack the split where that is not done yet, and open it under `views`."""
    module: Any = plugin("data_sharding.datasets", setup.data.name)
    source = module.source(setup.data, split)
    folder = setup.storage / "data" / f"{setup.data.name}-{source.fingerprint[:12]}" / split
    packed = (folder / "manifest.json").exists()
    dataset = PackedDataset.open(folder) if packed else pack(setup.data, module, split, folder, shard_bytes=4 << 20)
    return Split(dataset=dataset, views=ViewTable.open_or_draw(dataset, views))


def build_detector(setup: Setup, categories: tuple[Category, ...]) -> Detector:
    """The detector with its first weights: a function of settings and seed."""
    with Randomness(setup.seed, "student"):
        detector = plugin("kd.detectors", setup.detector.name).build(setup.detector, len(categories))
    return detector.to(torch.device(setup.device), memory_format=torch.channels_last)


class Randomness:
    """Weights drawn inside depend on (seed, purpose) alone, and nothing outside notices."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
        self._fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed. By default it returns every large tensor to the system, which hands it out
    again zeroed page by page: a third of a step on a CPU. Nothing happens where the C library is another one."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
