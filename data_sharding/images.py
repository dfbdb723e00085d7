"""Image files -> upright 8-bit RGB pixels.

Rules: EXIF orientation is applied. Grey becomes three equal channels, palettes become their colours, an alpha channel
is dropped (the colours under it are kept). 16-bit pixels keep their upper byte: the full range 0..65535 maps to 0..255,
whatever part of it an image uses, so that equal temperatures stay equal in every image. Of an animation the first
frame counts. Floating-point images are refused, for nothing says which value is white.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_sharding.jpeg_ends import shortened

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to undo each EXIF orientation; 1 and anything unknown is upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""The orientations that exchange width and height."""


def decode(data: bytes, name: str = "image") -> Tensor:
    """Decode the bytes of an image file to (3, h, w) uint8 RGB.

    Raises ValueError with `name`, the file's name for the message, for bytes that are no whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _as_rgb(image)
            pixels = np.array(rgb if turn is None else rgb.transpose(turn))
    # Broken files make Pillow raise nearly anything (OSError, SyntaxError, struct.error, OverflowError, ...).
    except Exception as error:
        raise ValueError(f"{name}: {len(data)} bytes that cannot be decoded as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def require_whole(data: bytes, name: str = "image") -> tuple[int, int]:
    """Read the bytes of an image file to their end, as `decode` will; its upright (width, height).

    A JPEG is turned into pixels at an eighth of the size only, and of plain ones just the ends are looked at.
    Raises ValueError with `name` for bytes that `decode` would refuse.
    """
    try:
        with Image.open(io.BytesIO(shortened(data) or data)) as image:
            width, height = image.size
            turned = _orientation(image) in _SIDEWAYS
            if image.format == "JPEG":
                image.draft("L", (1, 1))
                image.load()
            else:
                _as_rgb(image)
    except Exception as error:
        raise ValueError(f"{name}: {len(data)} bytes that cannot be decoded as an image ({error})") from error
    return (height, width) if turned else (width, height)


def upright_size(source: bytes | Path, name: str = "image") -> tuple[int, int]:
    """(width, height) after the EXIF rotation, from the header alone where the format allows it.

    Raises ValueError with `name` for what has no readable image header.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            turned = _orientation(image) in _SIDEWAYS
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({error})") from error
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    # Asked for EXIF, Pillow decodes a whole PNG to look behind its pixels. What stands before them decides here, for
    # sizes and for pixels alike. A TIFF is turned upright by Pillow itself.
    without = image.format == "PNG" and not {"exif", "Raw profile type exif", "xmp"} & set(image.info)
    if without or image.format == "TIFF":
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels: convert the file to 8 or 16 bits first")
    if image.mode.startswith("I"):
        values = np.array(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("pixels outside 0..65535: convert the file to 8 or 16 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
