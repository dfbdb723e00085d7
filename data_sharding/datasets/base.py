"""What a data set plug-in offers.

A file `datasets/<name>.py` holds `Config` (a frozen keyword-only dataclass with `name: Literal["<name>"]` and, where
labels come from files, `on_bad`), `categories(config) -> tuple[Category, ...]`, `source(config, split) -> Source` and
`records(config, split) -> Iterator[Record]`, which reads the source from the first record to the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_sharding.problems import BadImage, Problems
from data_sharding.record import Category, Record

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split whose labels were read and checked and whose images are read one at a time, in any order."""

    count: int
    fingerprint: str
    """SHA-256 of everything that decides the records, as far as it is known without reading the images: settings and
    label content, never where the files lie."""
    read: Callable[[int], Record]
    """The record at a position in [0, count), from any thread; BadImage where its pixels cannot be used."""
    problems: Problems = field(default_factory=lambda: Problems("the data set"))
    """What was wrong with the labels and is left out already, and what to do about the images' own problems."""

    def __iter__(self) -> Iterator[Record]:
        for position in range(self.count):
            try:
                record = self.read(position)
            except BadImage:
                if self.problems.on_bad == "stop":
                    raise
                continue
            yield record


class DatasetPlugin(Protocol):
    """The module of a data set, as `data_sharding.pack` uses it; `Any` is its own Config."""

    def categories(self, config: Any, /) -> tuple[Category, ...]: ...

    def source(self, config: Any, split: str, /) -> Source: ...


def configured(config: object) -> list[str]:
    """The splits that a plug-in's Config names."""
    return [split for split in SPLITS if getattr(config, split)]


def split_of(config: Any, split: str) -> Any:
    """What a plug-in's Config says of a split. Raises ValueError where it says nothing."""
    if split not in configured(config):
        told = ", ".join(configured(config)) or "none"
        raise ValueError(f"data set {config.name} has no split {split!r}; configured: {told}")
    return getattr(config, split)
