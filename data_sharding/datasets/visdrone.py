"""VisDrone-DET in its native layout: a split's folder holds `images` and, of the same names, `annotations/*.txt`.

Boxes count pixels from 0. Category 0 (ignored regions) and objects of score 0 become ignored regions: the official
toolkit drops what lies in the former and lets detections of the latter count neither way. Images have no ids in the
files: an id is the place of the name among all names of the split, from 1; an annotation's id is its line.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from data_sharding.datasets._boxes import clip
from data_sharding.datasets._image_files import find_images, look_at, read_image
from data_sharding.datasets._visdrone_lines import CLASSES, IGNORED, OTHERS, Line, read_lines
from data_sharding.datasets.base import Source, split_of
from data_sharding.problems import OnBad, Problems
from data_sharding.record import Category, Record


@dataclass(frozen=True, kw_only=True)
class Config:
    """VisDrone-DET, one folder per split, such as VisDrone2019-DET-train."""

    name: Literal["visdrone"] = "visdrone"
    train: Path | None = None
    val: Path | None = None
    test: Path | None = None
    others: Literal["ignore_in_training", "ignore", "background"] = "ignore_in_training"
    """What becomes of category 11: ignored regions in the training split and background in the others, as the official
    evaluation has it; ignored regions everywhere; or background everywhere."""
    on_bad: OnBad = "stop"
    """What to do about unusable images and lines: stop and tell them all, or skip them and write a report."""


@dataclass(frozen=True)
class _Image:
    """One image whose labels are read."""

    id: int
    name: str
    width: int
    height: int
    bytes: int
    lines: tuple[Line, ...]


def categories(config: Config) -> tuple[Category, ...]:
    """The ten classes, under their official numbers 1 to 10."""
    return tuple(Category(number, name) for number, name in enumerate(CLASSES, start=1))


def source(config: Config, split: str) -> Source:
    """Read and check the labels of a split.

    Raises ValueError where the split is not configured, its folder is not VisDrone's or empty and, in one message, for
    every kind of unusable content with its count and the first ten places, unless `on_bad` is skip.
    """
    folder: Path = split_of(config, split)
    for part in (folder / "images", folder / "annotations"):
        if not part.is_dir():
            raise ValueError(f"{part}: no such folder; a VisDrone split holds `images` and `annotations`")
    problems = Problems(folder, config.on_bad)
    images = _look_at_all(folder, problems)
    if not images:
        problems.split("split without usable images", folder.name)
    problems.stop_if_any()
    others = config.others == "ignore" or (config.others == "ignore_in_training" and split == "train")
    told = json.dumps([others, [[i.id, i.name, i.bytes, *map(_told, i.lines)] for i in images]])
    read = partial(_read, folder, images, others)
    fingerprint = hashlib.sha256(told.encode()).hexdigest()
    return Source(count=len(images), fingerprint=fingerprint, read=read, problems=problems)


def records(config: Config, split: str) -> Iterator[Record]:
    """Every image of a split, by name; also those without objects."""
    return iter(source(config, split))


def _look_at_all(folder: Path, problems: Problems) -> list[_Image]:
    """The usable images with their usable lines."""
    files = find_images(folder / "images")
    labelled = {path.stem for path in (folder / "annotations").glob("*.txt")}
    looked: list[_Image | None] = []
    for number, stem in enumerate(sorted(files.keys() | labelled), start=1):
        names = files.get(stem, [])
        if len(names) > 1:
            problems.image("two images of one name", stem, ", ".join(names))
        elif not names:
            problems.image("label file without an image", f"{stem}.txt")
        elif stem not in labelled:
            problems.image("image without a label file", names[0])
        else:
            looked.append(_look_at(folder, number, names[0], problems))
    return [image for image in looked if image is not None]


def _look_at(folder: Path, number: int, name: str, problems: Problems) -> _Image | None:
    found = look_at(folder / "images", name, problems)
    if found is None:
        return None
    width, height, length = found
    try:
        data = (folder / "annotations" / f"{Path(name).stem}.txt").read_bytes()
    except OSError as error:
        return problems.image("label file that cannot be read", name, type(error).__name__)
    return _Image(number, name, width, height, length, tuple(read_lines(data, name, (width, height), problems)))


def _told(line: Line) -> list[float]:
    return [line.number, *line.box, line.category, line.counts]


def _read(folder: Path, images: list[_Image], others_ignored: bool, position: int) -> Record:
    image = images[position]
    size = (image.width, image.height)
    objects = [line for line in image.lines if line.counts and IGNORED < line.category < OTHERS]
    regions = [
        line
        for line in image.lines
        if line.category == IGNORED
        or (line.category == OTHERS and others_ignored)
        or (line.category < OTHERS and not line.counts)
    ]
    boxes = clip([line.box for line in objects], *size)
    nothing = np.zeros(len(objects), np.bool_)
    return Record(
        image_id=image.id,
        file_name=image.name,
        width=image.width,
        height=image.height,
        image=read_image(folder / "images", image.name, size),
        boxes=boxes,
        labels=np.array([line.category - 1 for line in objects], np.int64),
        annotation_ids=np.array([line.number for line in objects], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=nothing,
        difficult=nothing,
        ignore_regions=clip([line.box for line in regions], *size),
    )
