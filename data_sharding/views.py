"""Views of a packed split: drawn once, stored beside the shards, and only ever read back."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_sharding.files import write_atomically
from data_sharding.shards import PackedDataset
from data_sharding.view_apply import photometric, place_boxes, place_labels, render, restore_boxes
from data_sharding.view_policy import View, ViewConfig, draw, evaluation, views_per_image

__all__ = [
    "View",
    "ViewConfig",
    "ViewTable",
    "draw",
    "evaluation",
    "photometric",
    "place_boxes",
    "place_labels",
    "render",
    "restore_boxes",
    "stored_view",
]

_VERSION = 1
_COLUMNS = ("image_id", "view", "x", "y", "width", "height", "size_h", "size_w", "flip", "canvas_h", "canvas_w")


@dataclass(frozen=True)
class ViewTable:
    """All views of a packed split under one policy. View k of the image at position i is row k * N + i."""

    config: ViewConfig
    uid: str
    """SHA-256 of the data set's uid, the policy and every stored view."""
    rows: np.ndarray
    """(K, N, 11) int32 or int64: the columns of the file."""

    @classmethod
    def open_or_draw(cls, dataset: PackedDataset, config: ViewConfig) -> "ViewTable":
        """Read the stored views of `dataset` under `config`; draw and store them first where there are none.

        Several processes may do this at once: each would store the same bytes.
        Raises ValueError for a stored table that is damaged or belongs to other shards.
        """
        path = table_path(dataset.folder, config)
        if not path.exists():
            write_atomically(path, _as_file(dataset, config))
        return cls(config, *_read(path, dataset, config))

    def __len__(self) -> int:
        """The number of images; each has `count` views."""
        return self.rows.shape[1]

    @property
    def count(self) -> int:
        """K: views per image, `config.count` unless images are tiled."""
        return self.rows.shape[0]

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """The canvases (height, width) that `canvas_ids` counts."""
        return self.config.buckets

    def view(self, position: int, index: int) -> View:
        """View `index` of the image at `position`."""
        _, k, x, y, width, height, size_h, size_w, flip, canvas_h, canvas_w = self.rows[index, position].tolist()
        return View(k, (x, y, width, height), (size_h, size_w), bool(flip), (canvas_h, canvas_w))

    def canvas_ids(self, k_per_image: np.ndarray) -> np.ndarray:
        """(N,) int64: the position in `buckets` of the canvas of view k_per_image[i] of every image i."""
        return self._canvas_table[k_per_image, np.arange(len(self))]

    @cached_property
    def _canvas_table(self) -> np.ndarray:
        """(K, N) int64: what `canvas_ids` picks from. Comparing canvases would be most of planning an epoch."""
        return (self.rows[:, :, None, -2:] == np.array(self.buckets)).all(3).argmax(2)


def table_path(folder: Path, config: ViewConfig) -> Path:
    """Where the views of a packed split are stored."""
    return folder / f"views-{hashlib.sha256(config.geometry.encode()).hexdigest()[:16]}.arrow"


def stored_view(dataset: PackedDataset, uid: str, position: int, index: int) -> View | None:
    """View `index` of the image at `position` out of the stored table with this uid; None where there is no such table
    beside the shards. For looking at what a teacher saw without the recipe."""
    for path in sorted(dataset.folder.glob("views-*.arrow")):
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        if (table.schema.metadata or {}).get(b"uid") == uid.encode():
            row = index * len(dataset) + position
            _, k, x, y, width, height, size_h, size_w, flip, canvas_h, canvas_w = (
                table[name][row].as_py() for name in _COLUMNS
            )
            return View(k, (x, y, width, height), (size_h, size_w), bool(flip), (canvas_h, canvas_w))
    return None


def _count(dataset: PackedDataset, config: ViewConfig) -> int:
    return views_per_image(config, zip(dataset.widths.tolist(), dataset.heights.tolist(), strict=True))


def _drawn(dataset: PackedDataset, config: ViewConfig) -> Iterator[tuple[int, ...]]:
    for index in range(_count(dataset, config)):
        for i in range(len(dataset)):
            image_id, width, height = (int(x[i]) for x in (dataset.image_ids, dataset.widths, dataset.heights))
            boxes = np.zeros((0, 4), np.float32)
            if config.crop is not None:
                record = dataset.record(i)
                boxes = record.boxes[~(record.crowd | record.difficult)]
            view = draw(config, dataset.uid, image_id, width, height, boxes, index)
            yield (image_id, index, *view.crop, *view.size, int(view.flip), *view.canvas)


def _as_file(dataset: PackedDataset, config: ViewConfig) -> bytes:
    rows = np.array(list(_drawn(dataset, config)), np.int64).reshape(-1, len(_COLUMNS))
    metadata = {"version": str(_VERSION), "dataset": dataset.uid, "geometry": config.geometry}
    metadata["uid"] = _uid(metadata, rows)
    schema = pa.schema([(name, pa.int64()) for name in _COLUMNS], metadata=metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([pa.array(column) for column in rows.T.copy()], schema=schema))
    return sink.getvalue().to_pybytes()


def _uid(metadata: dict[str, str], rows: np.ndarray) -> str:
    head = json.dumps([metadata[name] for name in ("version", "dataset", "geometry")]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest()


def _read(path: Path, dataset: PackedDataset, config: ViewConfig) -> tuple[str, np.ndarray]:
    try:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        rows = np.stack([table[name].to_numpy() for name in _COLUMNS], 1)
        sound = metadata["version"] == str(_VERSION) and metadata["uid"] == _uid(metadata, rows)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as stored views ({error}); delete it to draw them again") from error
    if not sound:
        raise ValueError(f"{path} is damaged or of another version than {_VERSION}; delete it to draw the views again")
    if metadata["dataset"] != dataset.uid or metadata["geometry"] != config.geometry:
        raise ValueError(
            f"{path} holds views of data set {metadata['dataset'][:12]}, but the shards beside it are data set "
            f"{dataset.uid[:12]}; delete it to draw the views again"
        )
    return metadata["uid"], rows.reshape(_count(dataset, config), len(dataset), len(_COLUMNS))
