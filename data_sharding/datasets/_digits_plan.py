"""Which digit goes where: whole numbers and chances from the settings alone, no pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_sharding.keyed import uniforms

SPLITS = ("train", "val", "test")
_SHARES = (0.7, 0.85, 1.0)
_CROP_SIDES = (128, 192)
"""Shortest and longest side of a background in its photograph. The smallest region of any photograph holds 128."""
_TRIES = 24
_GAP = 2


@dataclass(frozen=True)
class DigitPlan:
    """One digit in a square cell of the image."""

    sample: int
    """Which of scikit-learn's scans."""
    label: int
    x: int
    y: int
    size: int
    """The cell's side in pixels; the digit's longer side fills it."""
    dark: bool
    contrast: float
    tint: tuple[float, float, float]
    """Contrast and colour as numbers in [0, 1)."""


@dataclass(frozen=True)
class ImagePlan:
    """One image: a square of a photograph, and the digits on it."""

    photo: int
    crop: tuple[int, int, int]
    """(x, y, side) in the photograph's pixels, inside the split's region."""
    digits: tuple[DigitPlan, ...]


def region(height: int, width: int, split: str) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the part of a photograph that a split may use: no two splits share a pixel."""
    middle, half = int(0.6 * width), height // 2
    if split == "train":
        return 0, 0, middle, height
    return (middle, 0, width - middle, half) if split == "val" else (middle, half, width - middle, height - half)


def split_samples(labels: np.ndarray, split: str) -> np.ndarray:
    """The scans of a split: of every class 70 % train, 15 % val, 15 % test, the same whatever the settings."""
    number = SPLITS.index(split)
    chosen = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        own = own[np.argsort(uniforms("digits", "deal", label, count=len(own)), kind="stable")]
        first = 0.0 if number == 0 else _SHARES[number - 1]
        chosen.append(own[int(first * len(own)) : int(_SHARES[number] * len(own))])
    return np.sort(np.concatenate(chosen))


def plan_images(
    labels: np.ndarray,
    photo_sizes: Sequence[tuple[int, int]],
    split: str,
    *,
    count: int,
    image_size: int,
    objects: tuple[int, int],
    empty: float,
    digit_size: tuple[int, int],
    seed: int,
) -> tuple[ImagePlan, ...]:
    """Plan `count` images. `labels` are the classes of all scans, `photo_sizes` (height, width) of all photographs."""
    samples = split_samples(labels, split)
    plans = []
    for i in range(count):
        key = ("digits", seed, split, i)
        u = uniforms(*key, count=6)
        photo = int(u[0] * len(photo_sizes))
        crop = _crop(region(*photo_sizes[photo], split), u[1:4])
        wanted = 0 if u[4] < empty else objects[0] + int(u[5] * (objects[1] - objects[0] + 1))
        digits: list[DigitPlan] = []
        for j in range(wanted):
            digit = _place(uniforms(*key, j, count=7 + 2 * _TRIES), digits, samples, labels, image_size, digit_size)
            if digit is not None:
                digits.append(digit)
        plans.append(ImagePlan(photo, crop, tuple(digits)))
    return tuple(plans)


def _crop(within: tuple[int, int, int, int], u: np.ndarray) -> tuple[int, int, int]:
    x, y, width, height = within
    longest = min(_CROP_SIDES[1], width, height)
    shortest = min(_CROP_SIDES[0], longest)
    side = shortest + int(u[0] * (longest - shortest + 1))
    return x + int(u[1] * (width - side + 1)), y + int(u[2] * (height - side + 1)), side


def _place(
    u: np.ndarray,
    placed: Sequence[DigitPlan],
    samples: np.ndarray,
    labels: np.ndarray,
    image_size: int,
    digit_size: tuple[int, int],
) -> DigitPlan | None:
    """A digit on free ground, or None where a full image has none left after some tries."""
    sample = int(samples[int(u[0] * len(samples))])
    low, high = digit_size
    size = min(high, int(low * ((high + 1) / low) ** u[1]))
    for x, y in (u[7:].reshape(-1, 2) * (image_size - size + 1)).astype(int).tolist():
        if all(_apart(x, y, size, other) for other in placed):
            tint = (float(u[4]), float(u[5]), float(u[6]))
            return DigitPlan(sample, int(labels[sample]), x, y, size, bool(u[2] < 0.5), float(u[3]), tint)
    return None


def _apart(x: int, y: int, size: int, other: DigitPlan) -> bool:
    right, below = x >= other.x + other.size + _GAP, y >= other.y + other.size + _GAP
    left, above = x + size + _GAP <= other.x, y + size + _GAP <= other.y
    return right or below or left or above
