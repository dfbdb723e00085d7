"""Replaying a view on pixels, boxes and labels. Public names are reached through `data_sharding.views`.

Shape letters: N objects, R regions, H x W canvas. Boxes are x1 y1 x2 y2; pixel i covers the stretch [i, i + 1].
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from data_sharding.keyed import uniforms
from data_sharding.record import Record
from data_sharding.view_policy import View, ViewConfig


def render(image: Tensor, view: View, factor: int = 1) -> Tensor:
    """Render `view` of an image (3, h, w) uint8 as (3, factor * H, factor * W) uint8, zero outside the valid area.

    The larger rendering for a teacher is resized from the original pixels as well, never from the smaller one.
    Raises ValueError where the view is not one of this image.
    """
    x, y, width, height = view.crop
    if y + height > image.shape[1] or x + width > image.shape[2]:
        raise ValueError(
            f"the view crops {width} x {height} px at ({x}, {y}), but the image is {image.shape[2]} x "
            f"{image.shape[1]} px; the views were drawn for another image: delete the stored view table"
        )
    size = [view.size[0] * factor, view.size[1] * factor]
    pixels = _resize(image[:, y : y + height, x : x + width], size)
    canvas = image.new_zeros(image.shape[0], view.canvas[0] * factor, view.canvas[1] * factor)
    canvas[:, : size[0], : size[1]] = pixels.flip(2) if view.flip else pixels
    return canvas


def _resize(pixels: Tensor, size: list[int]) -> Tensor:
    # torch 2.15's vectorised uint8 kernel asserts or returns wrong pixels where the result is one column wide (it takes
    # the layout for channels-last), so that these few go through float.
    narrow = size[1] == 1
    source = pixels.float() if narrow else pixels.contiguous()
    resized = transforms.resize(source, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8) if narrow else resized


def place_boxes(boxes: np.ndarray | Tensor, view: View) -> tuple[Tensor, Tensor]:
    """Place source boxes (N, 4) on the canvas: (N, 4) float32 clipped to the valid area, and the visible part of each
    box's area (N,) float32 in [0, 1]; a box without area counts as invisible.

    For a rendering at `factor`, multiply the placed boxes by it: that is exact.
    """
    placed = torch.as_tensor(boxes).double().reshape(-1, 4)
    x, y, width, height = view.crop
    corner = placed.new_tensor([x, y, x, y])
    size = placed.new_tensor([width, height, width, height])
    area = (placed[:, 2:] - placed[:, :2]).prod(1)
    inside = torch.minimum((placed - corner).clamp(min=0), size)
    visible = (inside[:, 2:] - inside[:, :2]).prod(1) / area
    visible = torch.where(area > 0, visible, 0.0).clamp(0, 1)
    # Multiplied first, divided then: the crop's edge falls exactly on the valid area's edge.
    on_canvas = inside * placed.new_tensor([view.size[1], view.size[0]]).repeat(2) / size
    return _flipped(on_canvas, view).float(), visible.float()


def restore_boxes(boxes: Tensor, view: View) -> Tensor:
    """Bring boxes (N, 4) on the canvas back to source pixels, clipped to the crop: the inverse of `place_boxes`."""
    x, y, width, height = view.crop
    source = _flipped(boxes.double().cpu(), view)
    size = source.new_tensor([width, height, width, height])
    source = source * size / source.new_tensor([view.size[1], view.size[0]]).repeat(2)
    source = torch.minimum(source.clamp(min=0), size)
    return (source + source.new_tensor([x, y, x, y])).float()


def _flipped(boxes: Tensor, view: View) -> Tensor:
    if not view.flip:
        return boxes
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([view.size[1] - x2, y1, view.size[1] - x1, y2], 1)


def place_labels(record: Record, view: View, *, min_visible: float) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of a view: boxes (N, 4) float32, labels (N,) int64, and ignored regions (R, 4) float32.

    Wholly outside the crop: dropped. Crowds, VOC's difficult objects (its evaluation counts them neither way), objects
    of which less than `min_visible` is inside, and objects whose visible part has a side below 1 px on the canvas
    (nothing there could be learnt, and a detector that finds one should not be punished) become ignored regions.
    """
    boxes, visible = place_boxes(record.boxes, view)
    regions, region_visible = place_boxes(record.ignore_regions, view)
    thin = (boxes[:, 2:] - boxes[:, :2]).amin(1) < 1 if len(boxes) else torch.zeros(0, dtype=torch.bool)
    seen = visible > 0
    flagged = torch.from_numpy(np.array(record.crowd | record.difficult))
    ignored = flagged | (visible < min_visible) | thin
    keep = seen & ~ignored
    labels = torch.from_numpy(np.array(record.labels))[keep]
    return boxes[keep], labels, torch.cat([boxes[seen & ignored], regions[region_visible > 0]])


def photometric(canvas: Tensor, view: View, config: ViewConfig, key: tuple[object, ...]) -> Tensor:
    """Jitter the colours of a view rendered at any factor, (3, factor * H, factor * W) uint8; the padding stays zero.

    A function of the pixels, the settings and `key` alone: the loader's key is (seed, purpose, epoch, image).
    """
    if config.photometric == "none":
        return canvas
    u = uniforms("photometric", *key, count=4)
    factor = canvas.shape[1] // view.canvas[0]
    height, width = view.size[0] * factor, view.size[1] * factor
    pixels = canvas[:, :height, :width]
    pixels = transforms.adjust_brightness(pixels, 1 + float(2 * u[0] - 1) * config.brightness)
    pixels = transforms.adjust_contrast(pixels, 1 + float(2 * u[1] - 1) * config.contrast)
    pixels = transforms.adjust_saturation(pixels, 1 + float(2 * u[2] - 1) * config.saturation)
    pixels = transforms.adjust_hue(pixels, float(2 * u[3] - 1) * config.hue) if config.hue else pixels
    jittered = torch.zeros_like(canvas)
    jittered[:, :height, :width] = pixels
    return jittered
