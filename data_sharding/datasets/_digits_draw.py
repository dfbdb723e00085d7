"""The pixels of the digits set: scans and photographs from installed packages, and one image drawn from its plan."""

import gzip
import hashlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_sharding.datasets._digits_plan import DigitPlan, ImagePlan

SCANS = ("sklearn", "datasets/data/digits.csv.gz")
"""Rows of 64 grey values 0..16 and the class."""
PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/brick.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/moon.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/retina.jpg"),
    ("skimage", "data/rocket.jpg"),
)
"""(package, path inside it). No page, no clock: their own digits would be objects without a label."""

_INK = 0.3
_CONTRAST = (90.0, 190.0)
_TINT = 60.0


@dataclass(frozen=True)
class Materials:
    """What images are made of."""

    scans: np.ndarray
    """(1797, 8, 8) float32 in [0, 1]: 1 is ink."""
    labels: np.ndarray
    """(1797,) int64."""
    photos: tuple[np.ndarray, ...]
    """(h, w, 3) uint8 each."""
    digest: str
    """SHA-256 of all of it."""


def load_materials() -> Materials:
    """Read scans and photographs from the installed packages' folders, without importing the packages.

    Raises ModuleNotFoundError or FileNotFoundError with what to install.
    """
    with gzip.open(_installed(*SCANS), "rt") as file:
        table = np.loadtxt(file, np.float32, delimiter=",")
    scans, labels = table[:, :-1].reshape(-1, 8, 8) / np.float32(16), table[:, -1].astype(np.int64)
    photos = tuple(_photo(*where) for where in PHOTOS)
    digest = hashlib.sha256(scans.tobytes())
    for photo in photos:
        digest.update(photo.tobytes())
    return Materials(scans, labels, photos, digest.hexdigest())


def _photo(package: str, name: str) -> np.ndarray:
    with Image.open(_installed(package, name)) as image:
        return np.array(image.convert("RGB"))


def _installed(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the digits data set needs {package}: pip install scikit-learn scikit-image")
    path = Path(found.submodule_search_locations[0]) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the installed {package} lacks this file; install the locked version")
    return path


def draw(materials: Materials, plan: ImagePlan, image_size: int) -> tuple[bytes, np.ndarray]:
    """One image as PNG, and the tight boxes (N, 4) float32 of its digits' ink, in the plan's order."""
    x, y, side = plan.crop
    background = Image.fromarray(materials.photos[plan.photo][y : y + side, x : x + side])
    background = background.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.array(background, np.float32)
    boxes = [_compose(pixels, materials.scans[digit.sample], digit) for digit in plan.digits]
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue(), np.array(boxes, np.float32).reshape(-1, 4)


def _compose(pixels: np.ndarray, scan: np.ndarray, digit: DigitPlan) -> tuple[int, int, int, int]:
    """Blend a digit into its cell of `pixels`, in place; the box of its ink."""
    alpha = _enlarged(scan, digit.size)
    height, width = alpha.shape
    area = pixels[digit.y : digit.y + height, digit.x : digit.x + width]
    area[:] = area + (_colour(float(area.mean()), digit) - area) * alpha[..., None]
    rows, columns = (np.flatnonzero((alpha >= _INK).any(axis)) for axis in (1, 0))
    left, top = digit.x + int(columns[0]), digit.y + int(rows[0])
    return left, top, digit.x + int(columns[-1]) + 1, digit.y + int(rows[-1]) + 1


def _enlarged(scan: np.ndarray, size: int) -> np.ndarray:
    """The digit's opacity in [0, 1]; its ink's longer side is `size` pixels long, to within the soft edge."""
    rows, columns = (np.flatnonzero((scan >= _INK).any(axis)) for axis in (1, 0))
    ink = scan[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = size / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    soft = np.array(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))
    # The scans are blurred themselves; a steeper edge keeps large digits from looking like smoke.
    return (1.5 * soft - 0.15).clip(0, 1)


def _colour(background: float, digit: DigitPlan) -> np.ndarray:
    """(3,): lighter or darker than the background by the planned contrast, slightly coloured."""
    low, high = _CONTRAST
    contrast = low + (high - low) * digit.contrast
    dark = background >= low if digit.dark else background > 255 - low
    tint = (np.array(digit.tint, np.float32) - 0.5) * _TINT
    return (background + (-contrast if dark else contrast) + tint).clip(0, 255).astype(np.float32)
