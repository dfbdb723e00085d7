"""What a data set plug-in offers.

A file `datasets/<name>.py` holds `Config` (a frozen keyword-only dataclass with `name: Literal["<name>"]`),
`categories(config) -> tuple[Category, ...]`, `source(config, split) -> Source` and
`records(config, split) -> Iterator[Record]`, which reads the source from the first record to the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from data_sharding.record import Category, Record


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split whose labels were read and checked and whose images are read one at a time, in any order."""

    count: int
    fingerprint: str
    """SHA-256 of everything that decides the records, as far as it is known without reading the images: settings and
    label content, never where the files lie."""
    read: Callable[[int], Record]
    """The record at a position in [0, count)."""

    def __iter__(self) -> Iterator[Record]:
        return (self.read(position) for position in range(self.count))


class DatasetPlugin(Protocol):
    """The module of a data set, as `data_sharding.pack` uses it; `Any` is its own Config."""

    def categories(self, config: Any, /) -> tuple[Category, ...]: ...

    def source(self, config: Any, split: str, /) -> Source: ...
