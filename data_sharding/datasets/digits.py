"""The built-in detection set: real handwritten digits on real photographs, made in memory, nothing to download.

Digits are scikit-learn's 1797 scans of 8 x 8 px; photographs are those that lie in the installed scikit-learn and
scikit-image packages. Splits share neither a scan nor a pixel of a photograph: scans are dealt out per class, and a
photograph gives its left 60 % to train, the upper half of the rest to val and the lower half to test.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np

from data_sharding.datasets._digits_draw import Materials, draw, load_materials
from data_sharding.datasets._digits_plan import SPLITS, ImagePlan, plan_images
from data_sharding.datasets.base import Source
from data_sharding.record import Category, Record

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How many images, and what is on them. All lengths are pixels of the image as it is stored."""

    name: Literal["digits"] = "digits"
    train: int = 400
    val: int = 100
    test: int = 100
    """Images per split."""
    image_size: int = 256
    """Height and width of every image."""
    objects: tuple[int, int] = (1, 8)
    """Fewest and most digits on an image that has any."""
    empty: float = 0.04
    """Part of the images that has none."""
    digit_size: tuple[int, int] = (12, 56)
    """Shortest and longest height of a digit, drawn log-evenly. A student that sees the default 256 px images at
    128 px has digits of 6 to 28 px, its teacher at full size 12 to 56 px."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.digit_size
        if not 4 <= low <= high <= self.image_size // 2:
            raise ValueError(f"digit_size must be 4 <= low <= high <= image_size / 2, got {self.digit_size}")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be 1 <= fewest <= most, got {self.objects}")
        if not 0 <= self.empty <= 1:
            raise ValueError(f"empty must be in [0, 1], got {self.empty}")


def categories(config: Config) -> tuple[Category, ...]:
    """The ten digits; ids are labels."""
    return tuple(Category(digit, str(digit)) for digit in range(10))


def plan(config: Config, split: str) -> tuple[ImagePlan, ...]:
    """Which scans lie where on which part of which photograph: a function of the settings alone.

    Raises ValueError for an unknown or empty split.
    """
    return _plan(config, split, load_materials())


def source(config: Config, split: str) -> Source:
    """The split's images, drawn one at a time when they are read."""
    materials = load_materials()
    plans = _plan(config, split, materials)
    told = json.dumps([_VERSION, materials.digest, [asdict(p) for p in plans], config.image_size], sort_keys=True)
    read = partial(_read, config.image_size, split, materials, plans)
    return Source(count=len(plans), fingerprint=hashlib.sha256(told.encode()).hexdigest(), read=read)


def records(config: Config, split: str) -> Iterator[Record]:
    """Every image of a split."""
    return iter(source(config, split))


def _plan(config: Config, split: str, materials: Materials) -> tuple[ImagePlan, ...]:
    if split not in SPLITS or getattr(config, split) < 1:
        told = ", ".join(f"{s} {getattr(config, s)}" for s in SPLITS)
        raise ValueError(f"data set digits has no images in split {split!r}; images per split: {told}")
    return plan_images(
        materials.labels,
        [(photo.shape[0], photo.shape[1]) for photo in materials.photos],
        split,
        count=getattr(config, split),
        image_size=config.image_size,
        objects=config.objects,
        empty=config.empty,
        digit_size=config.digit_size,
        seed=config.seed,
    )


def _read(image_size: int, split: str, materials: Materials, plans: tuple[ImagePlan, ...], position: int) -> Record:
    image, boxes = draw(materials, plans[position], image_size)
    digits = plans[position].digits
    return Record(
        image_id=position + 1,
        file_name=f"{split}/{position + 1:06d}.png",
        width=image_size,
        height=image_size,
        image=image,
        boxes=boxes,
        labels=np.array([digit.label for digit in digits], np.int64),
        annotation_ids=np.array([1000 * (position + 1) + i for i in range(len(digits))], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.zeros(len(digits), np.bool_),
        difficult=np.zeros(len(digits), np.bool_),
    )
