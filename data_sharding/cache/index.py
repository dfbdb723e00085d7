"""Where in a cache each sample lies: an image in a view is one line of the index."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class Index:
    """All samples of a finished cache; a line is what they are counted by."""

    def __init__(self, folder: Path | str, columns: Mapping[str, np.ndarray], images: int, views: int) -> None:
        """`columns`: one value per sample, as `opening.read_index` gives them."""
        self.folder, self.columns = folder, columns
        self._line = np.full((views, images), -1, np.int64)
        self._line[columns["view"], columns["position"]] = np.arange(len(columns["row"]))
        short = (columns[name].tolist() for name in ("shard", "row", "image_id", "view"))
        self.places: Sequence[tuple[int, int, int, int]] = list(zip(*short, strict=True))
        """Of each line: shard, row of it, image id, view."""

    def __len__(self) -> int:
        return len(self.places)

    def lines(self, positions: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray) -> list[int]:
        """The line of each sample. Raises IndexError for one that is not in the cache."""
        (count, images), table = self._line.shape, self._line
        lines = []
        for position, view in zip(positions, views, strict=True):
            line = table.item(view, position) if 0 <= view < count and 0 <= position < images else -1
            if line < 0:
                raise IndexError(
                    f"{self.folder} has no image {position} in view {view}; it holds {images} images in {count} view(s)"
                )
            lines.append(line)
        return lines

    def shards(self, positions: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each sample, in the shape of the arguments."""
        return self.columns["shard"][self._line[views, positions]]

    def checksum(self, line: int) -> int:
        """What the index states of a sample's bytes."""
        return int(self.columns["checksum"][line])
