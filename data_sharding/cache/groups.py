"""Which taps of a cache are read together: neighbours of one codec and one width lie in one piece of a sample's row, so
that they are copied at once, travel at once, and are decoded at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np

from data_sharding.codecs.catalogue import Codec


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of a cache's taps, one behind the other."""

    codec: Codec
    channels: int
    first: int
    """The first of them, counted among all taps of the cache; `end` is behind the last."""
    end: int

    @property
    def count(self) -> int:
        """How many they are."""
        return self.end - self.first


def groups_of(names: Sequence[str], coding: Sequence[Codec], channels: Sequence[int]) -> tuple[Group, ...]:
    """All groups, in the order of the taps. `c5` is no level of a pyramid: it is always a group of its own."""
    found: list[Group] = []
    alike = zip((name == "c5" for name in names), (codec.name for codec in coding), channels, strict=True)
    for _, members in groupby(enumerate(alike), key=lambda tap: tap[1]):
        first, end = len(found) and found[-1].end, 1 + max(number for number, _ in members)
        found.append(Group(codec=coding[first], channels=channels[first], first=first, end=end))
    return tuple(found)


def pieces(content: np.ndarray, lengths: Sequence[int], groups: Sequence[Group]) -> tuple[np.ndarray, ...]:
    """(bytes,) uint8 of all taps, one after the other, cut where groups end. `lengths`: the bytes of each tap."""
    if len(groups) == 1:
        return (content,)
    ends = list(accumulate(lengths, initial=0))
    return tuple(content[ends[group.first] : ends[group.end]] for group in groups)
