"""Is a labelled box usable? The same answer for every label format."""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

CLIPPED = "box reaching out of the image (its inner part is used)"
_SURELY_SEEN, _SMALL = 0.25, 1 << 20
"""Pixels: below 2^20, float32 tells numbers apart that differ by an eighth."""
_TOLERANCE = 0.01
"""Pixels by which a box may reach out unsaid: the rounding of exporters."""


def number(value: object) -> float:
    """`value` as a float; NaN for whatever is no finite number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if abs(found) < float(np.finfo(np.float32).max) else math.nan


def box_problem(corners: Sequence[float], width: int, height: int) -> str:
    """What makes x1 y1 x2 y2 unusable as a box of an image, or an empty text. `clip` makes a usable one fit."""
    if len(corners) != 4 or not all(map(math.isfinite, corners)):
        return "box that is not four finite numbers"
    x1, y1, x2, y2 = corners
    if x2 < x1 or y2 < y1:
        return "reversed box (negative width or height)"
    if x2 == x1 or y2 == y1:
        return "box without area"
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return "box outside the image"
    seen = min(min(x2, width) - max(x1, 0.0), min(y2, height) - max(y1, 0.0))
    if seen > _SURELY_SEEN and max(width, height) < _SMALL:
        return ""
    # What is left of it may vanish when it is rounded to float32.
    inside = clip([list(corners)], width, height)[0]
    return "" if inside[2] > inside[0] and inside[3] > inside[1] else "box without area"


def reaches_out(corners: Sequence[float], width: int, height: int) -> bool:
    """Whether a usable box is cut by the image's edge."""
    x1, y1, x2, y2 = corners
    return min(x1, y1, width - x2, height - y2) < -_TOLERANCE


def clip(corners: Sequence[Sequence[float]], width: int, height: int) -> np.ndarray:
    """Boxes (N, 4) as x1 y1 x2 y2, cut to the image, float32."""
    boxes = np.array(corners, np.float64).reshape(-1, 4)
    return boxes.clip(0, [width, height, width, height]).astype(np.float32)
