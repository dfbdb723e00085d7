"""What `python -m cluster.inspect` finds in a packed split or a teacher cache."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import sample_picture
from cluster.grammar import ConfigError
from cluster.terminal import progress
from data_sharding import verify_cache, verify_packed
from data_sharding.cache.key import CacheKey
from data_sharding.remote import Remote, is_url
from data_sharding.shards import FORMAT
from data_sharding.verify import INDEX, MANIFEST, Contents, Damage, Kind, Place, damages, index_of

Rows = list[tuple[str, object]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A finished set, as its manifest and index describe it."""

    kind: Kind
    place: Place
    manifest: Mapping[str, Any]
    """Empty where it is damaged; so is the index."""
    index: Mapping[str, np.ndarray]
    damaged_head: list[Damage]
    """What keeps it from being described."""

    @property
    def key(self) -> CacheKey:
        """Of a teacher cache."""
        return verify_cache.stored_key(self.manifest)

    @property
    def rows(self) -> Rows:
        """The facts that a person looks for first."""
        if not self.manifest:
            return []
        place = ("place", self.place.location)
        return [place, *_size(self.manifest), *(_of_cache(self) if self.kind == "teacher cache" else _of_pack(self))]


def look(location: str) -> Found:
    """Read manifest and index. ConfigError where there is neither a packed split nor a teacher cache."""
    place = Place(location if is_url(location) else Path(location))
    content = place.read(MANIFEST)
    if isinstance(content, Damage):
        raise ConfigError(f"{location} holds no finished packed split or teacher cache: {MANIFEST} {content.what}")
    kind = _kind(place, content)
    manifest = _contents(kind).manifest_of(place)
    if isinstance(manifest, Damage):
        return Found(kind=kind, place=place, manifest={}, index={}, damaged_head=[manifest])
    index = index_of(place, manifest)
    if isinstance(index, Damage):
        return Found(kind=kind, place=place, manifest=manifest, index={}, damaged_head=[index])
    return Found(kind=kind, place=place, manifest=manifest, index=index, damaged_head=[])


def verified(found: Found) -> list[Damage]:
    """Read everything, with a bar in megabytes, and list what is damaged."""
    with progress("verify (MB)") as report:
        return list(
            damages(_contents(found.kind), found.place, lambda done, total: report(done >> 20, max(1, total >> 20)))
        )


def read_rows(found: Found) -> list[dict[str, object]]:
    """What a verification that found nothing has read."""
    shards = found.manifest["shards"]
    beside = f"{MANIFEST}, {INDEX}, {'key.json' if found.kind == 'teacher cache' else 'report and plan'}, any receipts"
    return [
        {"what": "shards", "value": f"{len(shards)} files, {sum(s['bytes'] for s in shards)} bytes: as written"},
        {"what": "samples", "value": f"{len(found.index['row'])}, each by its own checksum: as written"},
        {"what": "beside them", "value": f"{beside}: as written"},
    ]


def drawn(found: Found, number: int, path: Path, data: Path | None) -> Rows:
    """Write the picture of one sample, and say what it shows."""
    count = len(found.index["row"])
    if not 0 <= number < count:
        raise ConfigError(f"--sample {number}: there are {count} samples, 0 to {count - 1}")
    draw = sample_picture.of_cache if found.kind == "teacher cache" else sample_picture.of_pack
    return [*draw(found.place, found.manifest, found.index, number, path, data), ("picture", path)]


def _contents(kind: Kind) -> Contents:
    return verify_cache if kind == "teacher cache" else verify_packed


def _kind(place: Place, content: bytes) -> Kind:
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = {}
    if isinstance(manifest, dict) and "key" in manifest:
        return "teacher cache"
    if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
        return "packed split"
    # Damaged: the files beside it tell.
    beside = Remote(str(place.location)).sizes() if is_url(place.location) else _names(Path(place.location))
    return "teacher cache" if "key.json" in beside else "packed split"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _size(manifest: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    shards = manifest["shards"]
    total, rows = sum(s["bytes"] for s in shards), sum(s["rows"] for s in shards)
    yield "samples", rows
    yield "shards", len(shards)
    yield "MB", f"{total / 1e6:.3f}"
    yield "kB per sample", f"{total / 1e3 / max(1, rows):.1f}"
    yield "uid", manifest["uid"]


def _of_cache(found: Found) -> Iterator[tuple[str, object]]:
    yield "images x views", f"{found.manifest['images']} x {found.manifest['views']}"
    for name, value in asdict(found.key).items():
        yield f"key.{name}", _told(value)


def _of_pack(found: Found) -> Iterator[tuple[str, object]]:
    manifest, index = found.manifest, found.index
    yield "split", manifest["split"]
    yield "classes", ", ".join(c["name"] for c in manifest["categories"])
    if index:
        yield "objects", int(index["objects"].sum())
        yield "images without objects", int((index["objects"] == 0).sum())
        yield "width, px", f"{index['width'].min()} to {index['width'].max()}"
        yield "height, px", f"{index['height'].min()} to {index['height'].max()}"


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(" ".join(map(str, v)) if isinstance(v, tuple) else _told(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
