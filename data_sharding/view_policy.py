"""What views look like, and how one is drawn. Public names are reached through `data_sharding.views`.

A view is one geometric rendering of an image. It is drawn once, from a key that names the image and the view, and
is from then on a row of whole numbers that is only ever replayed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from data_sharding.keyed import uniforms
from data_sharding.tiles import Tiles, most_tiles, tile_crops

CANVAS_STEP = 128
_PHOTOMETRIC = ("photometric", "brightness", "contrast", "saturation", "hue")
_NOT_DRAWN = ("count", "min_visible", *_PHOTOMETRIC)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The recipe's `views`. The defaults with `count=1, flip=0` are the plain resize."""

    count: int = 1
    """K: views per image; with `tiles`: per tile. Views 0..K-1 stay what they are when K grows."""
    crop: tuple[int, int] | None = None
    """(height, width) in source pixels of a crop at a random position; a smaller image is taken whole."""
    crop_on_object: float = 0.75
    """Chance that the crop is placed on an object (drawn evenly), where the image has any."""
    tiles: Tiles | None = None
    """Each view shows one tile instead of a crop: view k of an image shows its tile k mod (the number of its tiles),
    so that an image has as many views as the split's most tiled image, and one with fewer tiles shows them in turn."""
    short_side: tuple[int, ...] | None = (800,)
    """Canvas pixels of the shorter side after the resize: one is drawn. None keeps the pixels as they are."""
    long_side: int = 1333
    """No side becomes longer than this. Without meaning where `short_side` is None."""
    scale: tuple[float, float] = (1.0, 1.0)
    """The size is multiplied by a factor drawn log-evenly from this range, before `long_side` caps it."""
    flip: float = 0.5
    """Chance of a horizontal flip."""
    buckets: tuple[tuple[int, int], ...] = ((896, 1152), (1152, 896), (896, 1408), (1408, 896))
    """The canvases (height, width); sides are multiples of 128. A view takes the smallest one that holds it; one
    that fits in none is shrunk into the canvas that keeps it largest."""
    min_visible: float = 0.25
    """An object with a smaller part of its box inside the crop becomes an ignored region."""
    photometric: Literal["none", "student_only"] = "none"
    """student_only: colours are jittered anew each epoch, on the student's pixels alone; teachers see clean ones."""
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    """These three: the factor is drawn evenly from [1 - x, 1 + x]."""
    hue: float = 0.02
    """The shift is drawn evenly from [-x, x], as a part of the colour circle; at most 0.5."""

    def __post_init__(self) -> None:
        problems = [text for wrong, text in self._checks() if wrong]
        if problems:
            raise ValueError("views: " + "; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        chances = {"crop_on_object": self.crop_on_object, "flip": self.flip, "min_visible": self.min_visible}
        strengths = {"brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}
        return [
            (self.count < 1, f"count must be at least 1, got {self.count}"),
            (self.crop is not None and min(self.crop) < 1, f"crop must be (height, width) above 0, got {self.crop}"),
            (self.crop is not None and self.tiles is not None, "crop and tiles exclude each other; set one to null"),
            (
                self.short_side is not None and (not self.short_side or min(self.short_side) < 1),
                f"short_side must be pixels above 0, or null to keep the size, got {self.short_side}",
            ),
            (self.long_side < 1, f"long_side must be above 0, got {self.long_side}"),
            (not 0 < self.scale[0] <= self.scale[1], f"scale must be (low, high), 0 < low <= high, got {self.scale}"),
            (not self.buckets, "buckets must name at least one canvas (height, width)"),
            (
                any(side < 1 or side % CANVAS_STEP for bucket in self.buckets for side in bucket),
                f"buckets must have sides that are multiples of {CANVAS_STEP}, got {self.buckets}",
            ),
            (len(set(self.buckets)) != len(self.buckets), f"buckets holds a canvas twice: {self.buckets}"),
            (
                self.photometric not in ("none", "student_only"),
                f"photometric must be none or student_only, got {self.photometric!r}",
            ),
            (not 0 <= self.hue <= 0.5, f"hue must be in [0, 0.5], got {self.hue}"),
            *((not 0 <= x <= 1, f"{name} must be in [0, 1], got {x}") for name, x in (chances | strengths).items()),
        ]

    @property
    def geometry(self) -> str:
        """JSON of every setting that a stored view or its labels depend on; photometric settings are not in it."""
        return _as_json(self, _PHOTOMETRIC)

    @property
    def policy(self) -> str:
        """JSON of the settings that a single view is drawn from: neither how many there are nor what is ignored."""
        return _as_json(self, _NOT_DRAWN)


def _as_json(config: ViewConfig, without: Sequence[str]) -> str:
    kept = {name: value for name, value in asdict(config).items() if name not in without}
    # Untiled views are drawn as they were before there were tiles.
    kept = kept if config.tiles is not None else {name: value for name, value in kept.items() if name != "tiles"}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class View:
    """One geometric rendering: whole numbers only, so that replaying it is exact."""

    index: int
    crop: tuple[int, int, int, int]
    """(x, y, width, height) in source pixels."""
    size: tuple[int, int]
    """(height, width) of the resized crop: the valid area at the canvas's top left."""
    flip: bool
    canvas: tuple[int, int]
    """(height, width)."""


def views_per_image(config: ViewConfig, sizes: Iterable[tuple[int, int]]) -> int:
    """K of a split whose images have these (width, height)."""
    return config.count if config.tiles is None else config.count * most_tiles(config.tiles, sizes)


def evaluation(config: ViewConfig) -> ViewConfig:
    """The one plain view per image that a model trained on `config` is evaluated on: whole image, no flip, no jitter,
    the largest `short_side`.

    Raises ValueError where crops or tiles are resized: the whole image's size at the same scale does not follow from
    `config`.
    """
    part = f"crops {config.crop}" if config.crop is not None else "tiles" if config.tiles is not None else ""
    if part and config.short_side is not None:
        raise ValueError(
            f"views: the evaluation view of {part} resized to short_side {config.short_side} is not "
            "determined; write the evaluation's views out, or set short_side to null"
        )
    short_side = None if config.short_side is None else (max(config.short_side),)
    plain = replace(config, count=1, crop=None, tiles=None, short_side=short_side, scale=(1.0, 1.0))
    return replace(plain, flip=0.0, photometric="none")


def draw(
    config: ViewConfig, dataset_uid: str, image_id: int, width: int, height: int, boxes: np.ndarray, index: int
) -> View:
    """Draw view `index` of an image, from hash(data set, image, view, policy) and nothing else.

    `boxes` (N, 4) in source pixels are the objects that crops are placed on; without a crop they do not matter.
    """
    u = uniforms("view", dataset_uid, image_id, index, config.policy, count=8)
    crop = _crop(config, width, height, boxes, u[3:7], index)
    size = _resized(config, crop[2], crop[3], u[0], u[1])
    size, canvas = _fit(size, config.buckets)
    return View(index, crop, size, bool(u[2] < config.flip), canvas)


def _crop(
    config: ViewConfig, width: int, height: int, boxes: np.ndarray, u: np.ndarray, index: int
) -> tuple[int, int, int, int]:
    if config.tiles is not None:
        tiles = tile_crops(config.tiles, width, height)
        return tiles[index % len(tiles)]
    if config.crop is None:
        return 0, 0, width, height
    crop_h, crop_w = min(config.crop[0], height), min(config.crop[1], width)
    x_range, y_range = (0.0, float(width - crop_w)), (0.0, float(height - crop_h))
    if len(boxes) and u[0] < config.crop_on_object:
        x1, y1, x2, y2 = (float(v) for v in boxes[int(u[1] * len(boxes))])
        x_range, y_range = _around(x1, x2, crop_w, x_range[1]), _around(y1, y2, crop_h, y_range[1])
    x, y = (round(low + v * (high - low)) for v, (low, high) in zip(u[2:], (x_range, y_range), strict=True))
    return x, y, crop_w, crop_h


def _around(low: float, high: float, crop: int, last: float) -> tuple[float, float]:
    """The first positions of a crop that holds [low, high] or, if that is longer than the crop, lies inside it."""
    first, second = sorted((high - crop, low))
    # Rounding inwards keeps an object whole when the position is rounded later; without a whole position, any side.
    first, second = (np.ceil(first), np.floor(second)) if np.ceil(first) <= np.floor(second) else (first, second)
    return min(max(float(first), 0.0), last), min(max(float(second), 0.0), last)


def _resized(config: ViewConfig, width: int, height: int, pick: float, jitter: float) -> tuple[int, int]:
    low, high = config.scale
    factor = low * (high / low) ** jitter
    if config.short_side is not None:
        short_side = config.short_side[int(pick * len(config.short_side))]
        factor = min(factor * short_side / min(width, height), config.long_side / max(width, height))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _fit(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size, shrunk where it fits in no canvas, and its canvas."""
    height, width = size
    holding = [b for b in buckets if height <= b[0] and width <= b[1]]
    if holding:
        return size, min(holding, key=lambda b: b[0] * b[1])
    canvas = max(buckets, key=lambda b: (min(b[0] / height, b[1] / width), -b[0] * b[1]))
    shrink = min(canvas[0] / height, canvas[1] / width)
    shrunk = (min(canvas[0], max(1, round(height * shrink))), min(canvas[1], max(1, round(width * shrink))))
    return shrunk, canvas
