"""Pascal VOC XML and whatever is labelled in its layout: ImageSets/Main lists, Annotations, JPEGImages.

A split is one or several parts, so that VOC 2007 and 2012 train together as papers have it. Boxes count pixels from 1
and hold their last pixel: [xmin - 1, xmax] here. Difficult objects keep their flag: the official evaluation lets them
count neither way, and so do loss and evaluation here. Ids are places: of an image in the lists one after the other, of
an annotation in its file, both from 1.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

import numpy as np

from data_sharding.datasets._boxes import clip
from data_sharding.datasets._image_files import SUFFIXES, is_file, leaves_folder, look_at, read_image
from data_sharding.datasets._voc_xml import Labelled, names_of, objects_of, parse, size_of
from data_sharding.datasets.base import SPLITS, Source, configured, split_of
from data_sharding.problems import OnBad, Problems
from data_sharding.record import Category, Record


@dataclass(frozen=True, kw_only=True)
class Part:
    """One list of images in one VOC folder."""

    folder: Path
    """Such as VOCdevkit/VOC2007: holds Annotations, ImageSets and, unless `images` says otherwise, JPEGImages."""
    list: str
    """The name of a file in ImageSets/Main, without .txt: trainval, test."""
    images: Path | None = None
    """The image folder where it is another one."""

    @property
    def image_folder(self) -> Path:
        """Where the images lie."""
        return self.folder / "JPEGImages" if self.images is None else self.images


@dataclass(frozen=True, kw_only=True)
class Config:
    """A data set in VOC's layout."""

    name: Literal["voc"] = "voc"
    train: tuple[Part, ...] = ()
    val: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()
    classes: tuple[str, ...] = ()
    """The class names in the order of their labels. Empty: all names in the files of all splits, sorted, which reads
    every file once more."""
    ignore_classes: tuple[str, ...] = ()
    """Names that are no classes: their boxes become ignored regions (HIT-UAV: DontCare)."""
    first_pixel: Literal[0, 1] = 1
    """How the files count pixels. VOC itself: from 1. Many tools that write its format: from 0."""
    on_bad: OnBad = "stop"
    """What to do about unusable images and objects: stop and tell them all, or skip them and write a report."""


@dataclass(frozen=True)
class _Image:
    """One image whose labels are read."""

    id: int
    folder: Path
    name: str
    width: int
    height: int
    bytes: int
    objects: tuple[Labelled, ...]


def categories(config: Config) -> tuple[Category, ...]:
    """The classes, numbered from 1. Raises ValueError where there are none, or one twice."""
    names = config.classes or tuple(sorted(_names_in_files(config) - set(config.ignore_classes)))
    if not names:
        raise ValueError("data set voc: no class is named in data.classes, and none was found in the files")
    if len(set(names)) != len(names) or set(names) & set(config.ignore_classes):
        raise ValueError(f"data set voc: each class must stand once in classes and ignore_classes, got {list(names)}")
    return tuple(Category(number, name) for number, name in enumerate(names, start=1))


def source(config: Config, split: str) -> Source:
    """Read and check the labels of a split.

    Raises ValueError where the split is not configured, a list is missing or empty and, in one message, for every
    kind of unusable content with its count and the first ten places, unless `on_bad` is skip.
    """
    parts: tuple[Part, ...] = split_of(config, split)
    names = [c.name for c in categories(config)]
    problems = Problems(" and ".join(str(part.folder) for part in parts), config.on_bad)
    known = (*names, *config.ignore_classes)
    looked = [_look_at(part, number, stem, known, config, problems) for number, part, stem in _listed(parts, problems)]
    images = [image for image in looked if image is not None]
    if not images:
        problems.split("split without usable images", ", ".join(part.list for part in parts))
    problems.stop_if_any()
    labels = {name: label for label, name in enumerate(names)}
    told = [names, config.ignore_classes, [[i.id, i.name, i.bytes, *map(_told, i.objects)] for i in images]]
    fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return Source(count=len(images), fingerprint=fingerprint, read=partial(_read, images, labels), problems=problems)


def records(config: Config, split: str) -> Iterator[Record]:
    """Every image of a split, in the order of its lists; also those without objects."""
    return iter(source(config, split))


def _listed(parts: tuple[Part, ...], problems: Problems) -> Iterator[tuple[int, Part, str]]:
    """Number, part and name without suffix of every image in the lists."""
    number = 0
    for part in parts:
        seen: set[str] = set()
        for line in _lines(part):
            number += 1
            stem, *more = line.split()
            if more:  # a list of one class has a flag in its second column; which images there are is all that counts
                problems.note("second word in the list (not used)", stem)
            if leaves_folder(stem):
                problems.image("file name that leaves the image folder", stem)
            elif stem in seen:
                problems.image("two images of one name", stem, f"in {part.list}.txt")
            else:
                seen.add(stem)
                yield number, part, stem


def _lines(part: Part) -> list[str]:
    path = part.folder / "ImageSets" / "Main" / f"{part.list}.txt"
    try:
        text = path.read_text("utf-8", "replace")
    except OSError as error:
        raise ValueError(f"{path}: no such list, or not readable ({type(error).__name__})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _names_in_files(config: Config) -> set[str]:
    silent = Problems("")
    parts = tuple(part for split in configured(config) for part in getattr(config, split))
    if not parts:
        raise ValueError(f"data set voc: none of {', '.join(SPLITS)} is set; set at least one")
    roots = (_xml(part, stem, silent) for _, part, stem in _listed(parts, silent))
    return set().union(*(names_of(root) for root in roots if root is not None))


def _xml(part: Part, stem: str, problems: Problems) -> Element | None:
    path = part.folder / "Annotations" / f"{stem}.xml"
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        missing = not is_file(path)
        kind = "missing annotation file" if missing else "annotation file that cannot be read"
        return problems.image(kind, f"{stem}.xml", "" if missing else str(error))


def _look_at(
    part: Part, number: int, stem: str, known: tuple[str, ...], config: Config, problems: Problems
) -> _Image | None:
    names = [f"{stem}{suffix}" for suffix in SUFFIXES if is_file(part.image_folder / f"{stem}{suffix}")]
    if len(names) > 1:
        return problems.image("two images of one name", stem, ", ".join(names))
    root = _xml(part, stem, problems)
    if root is None:
        return None
    name, size = names[0] if names else f"{stem}.jpg", size_of(root)
    found = look_at(part.image_folder, name, problems, size)
    if found is None:
        return None
    if size is None:
        problems.note("annotation file without the image's size (the image's own is used)", name)
    width, height, length = found
    pixel = config.first_pixel
    objects = objects_of(root, name, (width, height), known=known, first_pixel=pixel, problems=problems)
    return _Image(number, part.image_folder, name, width, height, length, tuple(objects))


def _told(labelled: Labelled) -> list[object]:
    return [labelled.number, labelled.name, *labelled.box, labelled.difficult]


def _read(images: list[_Image], labels: dict[str, int], position: int) -> Record:
    image = images[position]
    size = (image.width, image.height)
    objects = [o for o in image.objects if o.name in labels]
    boxes = clip([o.box for o in objects], *size)
    return Record(
        image_id=image.id,
        file_name=image.name,
        width=image.width,
        height=image.height,
        image=read_image(image.folder, image.name, size),
        boxes=boxes,
        labels=np.array([labels[o.name] for o in objects], np.int64),
        annotation_ids=np.array([o.number for o in objects], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.zeros(len(objects), np.bool_),
        difficult=np.array([o.difficult for o in objects], np.bool_),
        ignore_regions=clip([o.box for o in image.objects if o.name not in labels], *size),
    )
