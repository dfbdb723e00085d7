"""What makes two teacher caches the same: the key, and the layout of the taps that it implies."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sharding.batch import StoredTaps, Taps
from data_sharding.cache.groups import Group, groups_of
from data_sharding.codecs.catalogue import Codec, TapGroup, codec, tap_bytes
from data_sharding.codecs.foreground import level_sizes

CACHE_FORMAT = 4
COMMAND = "python -m cluster.cache_teacher"


class ForeignCache(ValueError):
    """A cache was made with other settings than this run asks for."""

    def __init__(self, folder: Path | str, differing: dict[str, tuple[Any, Any]]) -> None:
        self.folder, self.differing = folder, differing
        lines = "".join(
            f"\n  {name}: cache has {has!r}, this run asks for {asks!r}" for name, (has, asks) in differing.items()
        )
        super().__init__(
            f"teacher cache {folder} was made with other settings:{lines}\n"
            f"fill a cache for this run in another folder with `{COMMAND}`, or set the recipe back"
        )


@dataclass(frozen=True, kw_only=True)
class TapLayout:
    """Which taps a cache holds and how large they are, all on the student's grid."""

    names: tuple[str, ...]
    """`c5` is the last backbone stage; every other name is a pyramid level, finest first."""
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.names or not len(self.names) == len(self.channels) == len(self.strides):
            raise ValueError(
                f"expected one channel count and one stride per tap, got taps {self.names}, "
                f"channels {self.channels}, strides {self.strides}"
            )

    def sizes(self, canvas: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The (h, w) of each tap on a canvas of (H, W) pixels."""
        return level_sizes(canvas, self.strides)

    def split(self, taps: Taps, count: int, canvas: tuple[int, int]) -> tuple[Tensor, ...]:
        """The tensors of `count` images in the layout's order, each checked to be (count, C, h, w)."""
        pyramid = iter(taps.pyramid)
        found = tuple(taps.c5 if name == "c5" else next(pyramid, None) for name in self.names)
        if next(pyramid, None) is not None:
            raise ValueError(f"the cache holds {self.names}, the teacher gave {len(taps.pyramid)} pyramid levels")
        for name, x, channels, size in zip(self.names, found, self.channels, self.sizes(canvas), strict=True):
            expected = (count, channels, *size)
            if x is None or tuple(x.shape) != expected:
                shape = "nothing" if x is None else tuple(x.shape)
                raise ValueError(f"tap {name!r} on canvas {canvas}: expected {expected}, the teacher gave {shape}")
        return tuple(x for x in found if x is not None)

    def join(self, tensors: tuple[Tensor, ...]) -> Taps:
        """The taps of tensors in the layout's order."""
        named = dict(zip(self.names, tensors, strict=True))
        return Taps(named.pop("c5", None), tuple(named.values()))


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything that decides the bytes of a teacher cache, as plain values."""

    dataset_uid: str
    views_uid: str
    teacher: str
    """Name or description, for people."""
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    factor: int = 1
    """How much larger than the student's the teacher's pixels are."""
    align: str = "none"
    """The rule that brings the teacher's taps to the student's grid, such as `shift` for one at twice the size."""
    taps: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    """On the student's grid."""
    canvases: tuple[tuple[int, int], ...]
    codecs: tuple[str, ...]
    """One per tap."""
    enlarged: float | None = None
    """By how much boxes grow before their positions are stored; None where no codec is sparse."""
    compute_dtype: str = "float32"
    batch: int = 8
    """Images per forward of the teacher: rounding may depend on it, so it is part of the key."""
    shard_bytes: int = 256 * 2**20
    """A shard holds more only when one batch of the teacher does."""
    versions: tuple[tuple[str, str], ...] = ()
    """(library, version), as `library_versions` gives them."""
    format: int = CACHE_FORMAT

    def __post_init__(self) -> None:
        _ = self.layout
        if len(self.codecs) != len(self.taps):
            raise ValueError(f"expected one codec per tap {self.taps}, got {self.codecs}")
        if (self.enlarged is not None) != self.sparse:
            raise ValueError(f"sparse codecs, and they alone, need `enlarged`; got {self.enlarged} with {self.codecs}")
        if self.batch < 1 or self.shard_bytes < 1 or self.factor < 1:
            raise ValueError(
                "expected a batch, shard_bytes and a factor of at least 1, "
                f"got {self.batch}, {self.shard_bytes} and {self.factor}"
            )

    @property
    def layout(self) -> TapLayout:
        """The taps that the cache holds."""
        return TapLayout(names=self.taps, channels=self.channels, strides=self.strides)

    @property
    def coding(self) -> tuple[Codec, ...]:
        """The codec of each tap."""
        return tuple(codec(name) for name in self.codecs)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The taps that are read together."""
        return groups_of(self.taps, self.coding, self.channels)

    @property
    def sparse(self) -> bool:
        """Whether only foreground is stored of some tap."""
        return any(coding.sparse for coding in self.coding)

    @property
    def uid(self) -> str:
        """sha256 of the canonical JSON of all fields."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()

    def stored(self, found: Sequence[TapGroup]) -> StoredTaps:
        """The taps of a batch, by their names, of what was read of each of `groups`."""
        named = [(self.taps[group.first], one) for group, one in zip(self.groups, found, strict=True)]
        c5 = next((one for name, one in named if name == "c5"), None)
        return StoredTaps(c5, tuple(one for name, one in named if name != "c5"))

    def sample_bytes(self, canvas: tuple[int, int], rows: Sequence[int] | None = None) -> int:
        """Bytes of the taps of one image, of which `rows` positions per tap are foreground (None: all)."""
        cells = [h * w for h, w in self.layout.sizes(canvas)]
        kept = [r if c.sparse else n for c, r, n in zip(self.coding, rows or cells, cells, strict=True)]
        return sum(tap_bytes(*tap) for tap in zip(self.coding, self.channels, kept, cells, strict=True))

    def require_same(self, folder: Path | str, found: dict[str, Any]) -> None:
        """Raise ForeignCache when a key read back from JSON differs from this one."""
        mine = json.loads(canonical_json(asdict(self)))
        names = [f.name for f in fields(self)] + sorted(found.keys() - mine.keys())
        differing = {n: (found.get(n), mine.get(n)) for n in names if found.get(n) != mine.get(n)}
        if differing:
            raise ForeignCache(folder, differing)


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def library_versions() -> tuple[tuple[str, str], ...]:
    """The libraries whose version may change the teacher's pixels or features."""
    import PIL
    import torchvision

    return (("pillow", PIL.__version__), ("torch", str(torch.__version__)), ("torchvision", torchvision.__version__))
