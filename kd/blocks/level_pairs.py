"""Which levels of a pyramid find the small objects, and which tell of them (HMKD, JCST 2024; ambiguity H5)."""

from collections.abc import Sequence
from typing import Literal

Start = Literal["inquiry", "key"]


def level_pairs(
    strides: tuple[int, ...], pairs: Sequence[tuple[int, int]], start_layer: int | None, start_is: Start
) -> list[tuple[int, int]]:
    """(inquiring, answering) places in the pyramid of `strides`, of `pairs` of level numbers or, without any, of the
    one pair that begins at the start layer. One that is the finest level answers itself."""
    there = [stride.bit_length() - 1 for stride in strides]
    if pairs:
        named, setting = list(pairs), "pairs"
    elif start_layer is None:
        named, setting = [(there[min(1, len(there) - 1)], there[0])], "start_layer"
    elif start_is == "inquiry":
        named, setting = [(start_layer, max(start_layer - 1, there[0]))], "start_layer"
    else:
        named, setting = [(start_layer + 1, start_layer)], "start_layer"
    lacking = sorted({level for pair in named for level in pair} - set(there))
    if lacking:
        raise ValueError(
            f"hmkd.{setting} asks for {_told(lacking)}, which the student lacks: its pyramid has {_told(there)}; "
            "choose among these, or give the student that level"
        )
    return [(there.index(inquiring), there.index(key)) for inquiring, key in named]


def _told(levels: list[int]) -> str:
    return ", ".join(f"P{level}" for level in levels)
