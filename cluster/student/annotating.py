"""One image with its detections drawn on it, made for boxes of a few pixels: enlarged, thin lines, small words that
stand beside the boxes and never on one."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from kd.detectors.base import Detections

SHOWN_SIDE = 1280
"""Smaller images are enlarged, by a whole number, towards this long side in pixels."""
MOST_ENLARGED = 4
FONT_SIZE = 11
COLOURS = ("#ff4d6d", "#3ddc5b", "#6fa8ff", "#ffa531", "#c98bff", "#42d4f4", "#ff7fe9", "#d2f53c", "#fabed4", "#2ee6c5")
"""Light enough for a one-pixel line on a dark image, and for black words on them."""

Rectangle = tuple[float, float, float, float]


def annotated(image: Tensor, found: Detections, names: Sequence[str]) -> Image.Image:
    """(3, h, w) uint8 -> a picture with box, class and score of every detection, best first. Words for which no place
    is free are left out; the colour still tells the class."""
    factor = max(1, min(MOST_ENLARGED, SHOWN_SIDE // max(image.shape[1:])))
    picture = transforms.to_pil_image(image)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    boxes: list[Rectangle] = [_outside(box, factor) for box in found.boxes.tolist()]
    labels = [int(label) for label in found.labels]
    for box, label in zip(boxes, labels, strict=True):
        draw.rectangle(box, outline=COLOURS[label % len(COLOURS)], width=1)
    taken = list(boxes)
    for box, label, score in zip(boxes, labels, found.scores.tolist(), strict=True):
        text = f"{names[label]} {score:.2f}"
        place = _free_place(box, font.getbbox(text), picture.size, taken)
        if place is not None:
            taken.append(place)
            draw.rectangle(place, fill=COLOURS[label % len(COLOURS)])
            draw.text((place[0] + 1, place[1]), text, fill="black", font=font)
    return picture


def _outside(box: Sequence[float], factor: int) -> Rectangle:
    """A line around the box, not on the object's own pixels."""
    x1, y1, x2, y2 = (value * factor for value in box)
    return round(x1) - 1, round(y1) - 1, round(x2), round(y2)


def _free_place(
    box: Rectangle, text: tuple[float, float, float, float], size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle | None:
    """Above the box, below it, right or left of it: the first place inside the picture that covers nothing."""
    width, height = text[2] + 2, text[3] + 2
    x1, y1, x2, y2 = box
    corners = [
        (x1, y1 - height - 1), (x1, y2 + 1), (x2 + 2, y1), (x1 - width - 2, y1), (x2 - width, y1 - height - 1),
        (x2 - width, y2 + 1), (x2 + 2, y2 - height), (x1 - width - 2, y2 - height),
    ]  # fmt: skip
    for x, y in corners:
        place = (x, y, x + width, y + height)
        inside = x >= 0 and y >= 0 and place[2] <= size[0] and place[3] <= size[1]
        if inside and not any(_overlap(place, other) for other in taken if other != box):
            return place
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
