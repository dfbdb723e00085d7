"""Promises of decoding: upright RGB from whatever a camera or exporter writes, or an error that names the file."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_sharding.images import decode, upright_size

WIDTH, HEIGHT = 30, 20


def _file(image: Image.Image, format: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def _photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(pixels)


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_rgb_keeps_every_pixel() -> None:
    decoded = decode(_file(_photo()))
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert torch.equal(decoded, _pixels(_photo()))


@pytest.mark.parametrize("data", [b"", b"not an image", _file(_photo())[:300], _file(_photo(), "JPEG")[:-200]])
def test_what_is_no_whole_image_is_an_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"street/7\.png: \d+ bytes that cannot be decoded"):
        decode(data, "street/7.png")


def test_what_has_no_header_has_no_size() -> None:
    with pytest.raises(ValueError, match=r"street/7\.png"):
        upright_size(b"not an image", "street/7.png")


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "PA"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = _photo().convert("RGBA").convert("P").convert("PA") if mode == "PA" else _photo().convert(mode)
    data = _file(image, "TIFF") if mode in ("CMYK", "PA") else _file(image)
    with Image.open(io.BytesIO(data)) as stored:
        expected = _pixels(stored)
    assert torch.equal(decode(data), expected)


def test_grey_becomes_three_equal_channels_and_alpha_is_dropped() -> None:
    grey = decode(_file(_photo().convert("L")))
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    seen = _photo()
    veiled = seen.copy()
    veiled.putalpha(0)
    assert torch.equal(decode(_file(veiled)), _pixels(seen))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_byte_whatever_range_is_used(format: str) -> None:
    values = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
    decoded = decode(_file(Image.fromarray(values), format))
    assert decoded[:, 0].tolist() == [[0, 0, 1, 3, 128, 255]] * 3


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.tif.*floating-point"):
        decode(_file(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "x.tif")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_rotation_is_applied_to_pixels_and_size(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # A gradient survives JPEG: its corners say how it lies.
    across, down = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    stored = np.stack([across, down, across * 0], 2).astype(np.uint8)
    settings = {"lossless": True} if format == "WEBP" else {}
    data = _file(Image.fromarray(stored), format, exif=exif, **settings)
    # EXIF 2.32, table 6: where the stored first row and first column belong.
    upright = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored[::-1].swapaxes(0, 1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored[:, ::-1].swapaxes(0, 1),
    }.get(orientation, stored)
    decoded = decode(data).permute(1, 2, 0).numpy()
    assert decoded.shape == upright.shape
    assert upright_size(data) == (upright.shape[1], upright.shape[0])
    difference = np.abs(decoded[..., :2].astype(int) - upright[..., :2].astype(int))
    assert difference.max() <= (40 if format == "JPEG" else 0)
    assert difference.mean() < 5


def test_size_is_read_from_a_path_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_file(_photo()))
    assert upright_size(path) == (WIDTH, HEIGHT)
