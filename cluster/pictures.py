"""Image panels: the same images side by side, with the ground truth and with what each detector found."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from data_sharding.images import decode
from data_sharding.record import Record
from data_sharding.shards import PackedDataset
from kd.detectors.base import Detections

SHOWN_SCORE = 0.3
WIDTH = 480
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990")


def beside_truth(
    dataset: PackedDataset, columns: Mapping[str, Mapping[int, Detections]], path: Path, count: int = 4
) -> Path:
    """Write a PNG: one row per image (the `count` with most objects), a column of ground truth and one per detector."""
    records = sorted((dataset.record(i) for i in range(len(dataset))), key=lambda r: (-len(r.boxes), r.image_id))
    names = [category.name for category in dataset.categories]
    rows = [_row(record, columns, names) for record in records[:count]]
    _titled(torch.cat(rows, dim=1), ["ground truth", *columns]).save(path)
    return path


def read_results(path: Path, dataset: PackedDataset) -> dict[int, Detections]:
    """Detections by image id out of a file of COCO results; images without any are there, empty."""
    labels = {category.id: label for label, category in enumerate(dataset.categories)}
    found: dict[int, list[tuple[list[float], float, int]]] = {int(i): [] for i in dataset.image_ids}
    for result in json.loads(path.read_text()):
        x, y, width, height = result["bbox"]
        found[result["image_id"]].append(
            ([x, y, x + width, y + height], result["score"], labels[result["category_id"]])
        )
    return {
        image: Detections(
            torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
            torch.tensor([score for _, score, _ in rows]),
            torch.tensor([label for _, _, label in rows], dtype=torch.int64),
        )
        for image, rows in found.items()
    }


def _row(record: Record, columns: Mapping[str, Mapping[int, Detections]], names: list[str]) -> Tensor:
    image = decode(record.image, record.file_name)
    cells = [_drawn(image, torch.from_numpy(record.boxes.copy()), [int(x) for x in record.labels], names)]
    for found in columns.values():
        detections = found[record.image_id]
        keep = detections.scores >= SHOWN_SCORE
        cells.append(_drawn(image, detections.boxes[keep], detections.labels[keep].tolist(), names))
    return torch.cat(cells, dim=2)


def _drawn(image: Tensor, boxes: Tensor, labels: list[int], names: list[str]) -> Tensor:
    """The image at a common width with its boxes drawn on it: (3, h, WIDTH)."""
    factor = WIDTH / image.shape[2]
    large = F.resize(image, [round(image.shape[1] * factor), WIDTH], antialias=True)
    if not labels:
        return large
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    words = [names[label] for label in labels]
    return draw_bounding_boxes(large, boxes * factor, labels=words, colors=list(colours), width=2)


def _titled(panel: Tensor, titles: list[str]) -> Image.Image:
    picture = Image.new("RGB", (panel.shape[2], panel.shape[1] + 24), "white")
    picture.paste(F.to_pil_image(panel), (0, 24))
    draw = ImageDraw.Draw(picture)
    for number, title in enumerate(titles):
        draw.text((number * WIDTH + 6, 6), title, fill="black")
    return picture
