"""How one tap of a teacher becomes bytes and comes back: the codecs by name.

`fp16` and `fp32` are dense numbers; `int8_*` dense whole numbers with a scale per channel or per position; `sparse_*`
the same of the positions inside slightly enlarged boxes. `int8` and `sparse` in a recipe mean the one of the two that
errs less on the recipe's own teacher; a cache's key names the one that was chosen.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from data_sharding.codecs.base import Codec, CodecError, Encoded, mask_bytes, row_bytes, scale_count, tap_bytes
from data_sharding.codecs.dense import Dense
from data_sharding.codecs.int8 import Int8
from data_sharding.codecs.stored import TapGroup, stack

__all__ = [
    "CHOICES",
    "CODECS",
    "Codec",
    "CodecError",
    "Encoded",
    "TapGroup",
    "codec",
    "decode",
    "mask_bytes",
    "row_bytes",
    "scale_count",
    "stack",
    "tap_bytes",
]

_ALL: tuple[Codec, ...] = (
    Dense(name="fp16", dtype=torch.float16),
    Dense(name="fp32", dtype=torch.float32),
    Int8(name="int8_channel", per="channel"),
    Int8(name="int8_position", per="position"),
    Int8(name="sparse_channel", per="channel", sparse=True),
    Int8(name="sparse_position", per="position", sparse=True),
)
CODECS: Mapping[str, Codec] = MappingProxyType({one.name: one for one in _ALL})
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"int8": ("int8_channel", "int8_position"), "sparse": ("sparse_channel", "sparse_position")}
)
"""What a recipe may leave to measurement, and between which codecs; the last one needs the most bytes."""


def codec(name: str) -> Codec:
    """The codec of that name."""
    if name not in CODECS:
        raise ValueError(f"no codec {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name]


def decode(encoded: Encoded, name: str, shape: tuple[int, int, int], *, level: str) -> Tensor:
    """Decode one tap to a (C, h, w) float32 tensor whose memory has the channels last; zero where nothing is stored."""
    return stack(codec(name), [encoded], shape, level=level).maps()[0][0]
