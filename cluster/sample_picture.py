"""One stored sample as a picture: the image with its boxes, and how strongly the teacher answers at each position."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cluster.grammar import ConfigError
from cluster.pictures import COLOURS
from data_sharding import images
from data_sharding.cache.batch import BatchCopy
from data_sharding.cache.buffers import BatchBuffers
from data_sharding.cache.key import CacheKey
from data_sharding.cache.rows import StoredRow, read_row
from data_sharding.record import Record
from data_sharding.record_codec import SCHEMA
from data_sharding.record_codec import decode as decode_record
from data_sharding.shards import PackedDataset, ShardCorrupt
from data_sharding.verify import Place
from data_sharding.verify_cache import stored_key
from data_sharding.views import View, place_boxes, render, stored_view

Rows = list[tuple[str, object]]
INCHES = 4.2


def of_pack(
    place: Place, manifest: Mapping[str, Any], index: Mapping[str, np.ndarray], number: int, path: Path, _: Path | None
) -> Rows:
    """The image of a packed split with its boxes."""
    content = _shard(place, manifest, int(index["shard"][number]))
    start, size = int(index["offset"][number]), int(index["bytes"][number])
    record = decode_record(pa.ipc.read_record_batch(pa.py_buffer(content).slice(start, size), SCHEMA))
    names = [c["name"] for c in manifest["categories"]]
    figure = Figure(figsize=(2 * INCHES, 2 * INCHES * record.height / record.width + 0.4), layout="constrained")
    axes = figure.subplots()
    _image(axes, images.decode(record.image, record.file_name), torch.from_numpy(record.boxes), record, names)
    axes.set_title(f"{record.file_name} (image id {record.image_id})")
    figure.savefig(path, format="png", dpi=100)
    return [("image id", record.image_id), ("file", record.file_name), ("objects", len(record.boxes))]


def of_cache(
    place: Place,
    manifest: Mapping[str, Any],
    index: Mapping[str, np.ndarray],
    number: int,
    path: Path,
    data: Path | None,
) -> Rows:
    """What the teacher answered, level by level, beside the very view of the image that it saw."""
    key, sample = stored_key(manifest), _sample(place, manifest, index, number)
    maps = _energies(sample, key)
    seen = _seen(place, key, data, int(index["position"][number]), sample)
    figure = Figure(figsize=(INCHES * (1 + len(maps)), INCHES * sample.canvas[0] / sample.canvas[1] + 0.8))
    figure.set_layout_engine("constrained")
    first, *others = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    rows: Rows = [("image id", sample.image_id), ("view", sample.view), ("canvas", "{} x {}, valid {} x {}")]
    rows[-1] = ("canvas", "{} x {}, valid {} x {}".format(*sample.canvas))
    if seen is None:
        first.set_axis_off()
        first.text(0.5, 0.5, "the packed split\nis not here", ha="center", va="center")
        rows.append(("image", "not drawn: the packed split that the teacher saw was not found; name it with --data"))
    else:
        record, view, names = seen
        boxes, visible = place_boxes(record.boxes, view)
        pixels = render(images.decode(record.image, record.file_name), view)
        _image(first, pixels, torch.where(visible[:, None] > 0, boxes, torch.nan), record, names)
        first.set_title(f"{record.file_name}, view {view.index}")
        rows.append(("file", record.file_name))
    for axes, name, energy in zip(others, key.taps, maps, strict=True):
        _heat(axes, energy, f"{key.teacher}: {name}, {energy.shape[0]} x {energy.shape[1]}")
        rows.append((f"RMS of {name}", _span(energy)))
    figure.savefig(path, format="png", dpi=100)
    return rows


def _sample(place: Place, manifest: Mapping[str, Any], index: Mapping[str, np.ndarray], number: int) -> StoredRow:
    shard, row = int(index["shard"][number]), int(index["row"][number])
    reader = pa.ipc.open_file(_shard(place, manifest, shard))
    return read_row(reader.get_batch(row), stored_key(manifest))


def _shard(place: Place, manifest: Mapping[str, Any], number: int) -> bytes:
    """A shard's bytes; ShardCorrupt where they are not the ones that were written."""
    shard = manifest["shards"][number]
    content, damage = place.checked(shard["name"], shard["bytes"], shard["xxh3_128"])
    if damage is not None:
        raise ShardCorrupt(f"{place.location}: {damage.file}: {damage.what}; --verify lists all that has changed")
    return content


def _energies(sample: StoredRow, key: CacheKey) -> list[np.ndarray]:
    """Per tap the root mean square over the channels, (h, w); not a number where nothing is stored."""
    batch = BatchCopy([sample], key.groups, key.layout.sizes(sample.canvas[:2]), BatchBuffers(pin=False))
    batch.copy()
    levels, maps = [x[0] for group in batch.taps() for x in group.maps()], []
    for level, rows in zip(levels, sample.rows, strict=True):
        energy = level.square().mean(0).sqrt().numpy()
        maps.append(np.where(energy > 0, energy, np.nan) if rows < energy.size else energy)
    return maps


def _span(energy: np.ndarray) -> str:
    stored = energy[np.isfinite(energy)]
    if not stored.size:
        return "nothing is stored"
    part = "" if stored.size == energy.size else f", {stored.size} of {energy.size} positions stored"
    return f"{stored.min():.4g} to {stored.max():.4g}, mean {stored.mean():.4g}{part}"


def _seen(
    place: Place, key: CacheKey, data: Path | None, position: int, sample: StoredRow
) -> tuple[Record, View, list[str]] | None:
    """The record, its view and the classes' names, where the packed split is at hand."""
    folders = [data] if data is not None else sorted(Path(place.location).parent.parent.glob("data/*/*"))
    for folder in folders:
        if not (folder / "manifest.json").exists():
            continue
        dataset = PackedDataset.open(folder)
        if dataset.uid == key.dataset_uid:
            view = stored_view(dataset, key.views_uid, position, sample.view)
            if view is not None:
                return dataset.record(position), view, [c.name for c in dataset.categories]
    if data is not None:
        raise ConfigError(
            f"--data {data} is not the packed split, with its views, that this cache was filled from (uid "
            f"{key.dataset_uid[:12]}, views {key.views_uid[:12]})"
        )
    return None


def _image(axes: Axes, pixels: Tensor, boxes: Tensor, record: Record, names: list[str]) -> None:
    """(3, h, w) uint8 with boxes (N, 4) in its pixels; a box that is not a number is outside."""
    from matplotlib.patches import Rectangle

    axes.imshow(pixels.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), record.labels.tolist(), strict=True):
        if x1 == x1:
            colour = COLOURS[label % len(COLOURS)]
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour))
    shown = sorted(set(record.labels.tolist()))
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[label % len(COLOURS)]) for label in shown]
    if handles:
        axes.legend(handles, [names[label] for label in shown], loc="lower right", fontsize="small")


def _heat(axes: Axes, energy: np.ndarray, title: str) -> None:
    axes.set_facecolor("lightgrey")  # shows through where nothing is stored
    drawn = axes.imshow(energy, cmap="inferno", vmin=0, vmax=np.nanmax(energy, initial=1e-9), interpolation="nearest")
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(drawn, ax=axes, shrink=0.8)
