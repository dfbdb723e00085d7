"""The same four labelled images in each label format, small enough to be damaged thousands of times."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_sharding.datasets import coco, visdrone, voc
from data_sharding.record import Record

SIZES = {"a": (48, 40), "b": (40, 48), "c": (64, 32), "d": (50, 50)}
BOXES = {"a": [(4, 4, 10, 12), (20, 10, 9, 9)], "b": [(0, 0, 40, 48)], "c": [(50, 20, 14, 12), (1, 1, 2, 2)], "d": []}
"""x y width height, whole numbers that every format can say."""


@dataclass(frozen=True)
class Format:
    """A data set in one format, and how its labels lie on disk."""

    module: Any
    config: Any
    labels: Path
    """The file that is damaged: of image `a` where each image has its own."""
    images: Path


def image_file(stem: str, suffix: str = "jpg") -> bytes:
    width, height = SIZES[stem]
    random = np.random.Generator(np.random.Philox(key=ord(stem)))
    rough = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height))
    file = io.BytesIO()
    rough.save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return file.getvalue()


def _write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in SIZES:
        (folder / f"{stem}.jpg").write_bytes(image_file(stem))
    return folder


def coco_content() -> dict[str, Any]:
    numbers = {stem: 10 + i for i, stem in enumerate(SIZES)}
    images = [
        {"id": numbers[stem], "file_name": f"{stem}.jpg", "width": width, "height": height}
        for stem, (width, height) in SIZES.items()
    ]
    boxes = [(stem, box) for stem in SIZES for box in BOXES[stem]]
    annotations = [
        {"id": 1000 + i, "image_id": numbers[stem], "category_id": 3, "bbox": list(box), "area": 50.0, "iscrowd": 0}
        for i, (stem, box) in enumerate(boxes)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "car"}]}


def as_coco(folder: Path, on_bad: str) -> Format:
    images, labels = _write_images(folder / "images"), folder / "labels.json"
    labels.write_text(json.dumps(coco_content()))
    split = coco.Split(images=images, annotations=labels)
    return Format(coco, coco.Config(train=split, on_bad=on_bad), labels, images)  # pyright: ignore


def as_visdrone(folder: Path, on_bad: str) -> Format:
    images, annotations = _write_images(folder / "images"), folder / "annotations"
    annotations.mkdir(exist_ok=True)
    for stem in SIZES:
        lines = [",".join(map(str, (*box, 1, 4, 0, 0))) + "\n" for box in BOXES[stem]]
        (annotations / f"{stem}.txt").write_text("".join(lines))
    config = visdrone.Config(train=folder, on_bad=on_bad)  # pyright: ignore[reportArgumentType]
    return Format(visdrone, config, annotations / "a.txt", images)


def voc_xml(stem: str) -> str:
    width, height = SIZES[stem]
    corners = [(x + 1, y + 1, x + w, y + h) for x, y, w, h in BOXES[stem]]
    boxes = "".join(
        "<object><name>car</name><difficult>0</difficult><bndbox>"
        + "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for box in corners
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{stem}.jpg</filename>{size}{boxes}</annotation>"


def as_voc(folder: Path, on_bad: str) -> Format:
    images, annotations, lists = _write_images(folder / "JPEGImages"), folder / "Annotations", folder / "ImageSets/Main"
    annotations.mkdir(exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    for stem in SIZES:
        (annotations / f"{stem}.xml").write_text(voc_xml(stem))
    (lists / "train.txt").write_text("".join(f"{stem}\n" for stem in SIZES))
    config = voc.Config(
        train=(voc.Part(folder=folder, list="train"),),
        classes=("car",),
        on_bad=on_bad,  # pyright: ignore[reportArgumentType]
    )
    return Format(voc, config, annotations / "a.xml", images)


FORMATS = {"coco": as_coco, "visdrone": as_visdrone, "voc": as_voc}


def labels_of(records: list[Record]) -> set[tuple[str, tuple[float, ...]]]:
    """What was labelled: (image, box as x1 y1 x2 y2)."""
    return {(r.file_name, tuple(box)) for r in records for box in r.boxes.tolist()}


def expected(without: str = "") -> set[tuple[str, tuple[float, ...]]]:
    """`labels_of` of the undamaged data, without one image."""
    return {
        (f"{stem}.jpg", (float(x), float(y), float(x + w), float(y + h)))
        for stem in SIZES
        for x, y, w, h in BOXES[stem]
        if stem != without
    }


def require_sound(record: Record) -> None:
    """No box of a record is empty, not a number, or outside its image."""
    size = np.array([record.width, record.height] * 2)
    for boxes in (record.boxes, record.ignore_regions):
        assert np.isfinite(boxes).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= size).all()
    assert np.isfinite(record.areas).all()
    assert (record.areas >= 0).all()
    assert ((record.labels >= 0) & (record.labels < 10)).all()
