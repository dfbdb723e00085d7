"""Finds everything that is wrong with a COCO JSON file, before any of it is used."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from numbers import Real
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from data_sharding.images import upright_size

_LISTS = ("images", "annotations", "categories")
_FIRST = 10


class Problems:
    """What is wrong, by kind, told all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, list[str]] = {}
        """Kind of problem -> where it was found."""

    def add(self, kind: str, image: object, annotation: object = None) -> None:
        """Note one problem of an image file or, with an id, of one of its annotations."""
        place = f"{image}" if annotation is None else f"{image} annotation {annotation}"
        self.places.setdefault(kind, []).append(place)

    def stop_if_any(self) -> None:
        """Raise one ValueError that counts every kind and names the first ten places."""
        if not self.places:
            return
        counts = "; ".join(f"{len(places)} x {kind}" for kind, places in self.places.items())
        named = [f"{place}: {kind}" for kind, places in self.places.items() for place in places][:_FIRST]
        total = sum(len(places) for places in self.places.values())
        more = f"\n  and {total - _FIRST} more" if total > _FIRST else ""
        raise ValueError(f"{self.path} cannot be used: {counts}\n  " + "\n  ".join(named) + more)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a COCO file whose images, annotations and categories have the fields that COCO gives them.

    Raises ValueError for anything that is not COCO's layout, FileNotFoundError where there is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _LISTS):
        raise ValueError(
            f"{path} is not COCO: expected an object with the lists {', '.join(_LISTS)}, found {found}"
            + ("; `annotation` in the singular is HIT-UAV's native layout: convert it" if "annotation" in found else "")
        )
    problems = Problems(path)
    _check_fields(content, problems)
    problems.stop_if_any()
    return content


def _check_fields(content: dict[str, Any], problems: Problems) -> None:
    wanted: dict[str, dict[str, type]] = {
        "images": {"id": int, "file_name": str, "width": int, "height": int},
        "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
        "categories": {"id": int, "name": str},
    }
    for name, fields in wanted.items():
        for position, entry in enumerate(content[name]):
            wrong = [f for f, t in fields.items() if not (isinstance(entry, dict) and isinstance(entry.get(f), t))]
            if wrong:
                problems.add(f"{name} entry without a valid {', '.join(wrong)}", f"{name}[{position}]")


def check(content: dict[str, Any], folder: Path, problems: Problems) -> list[int]:
    """Note everything that makes the content unusable; the size in bytes of each image file, 0 where it is missing."""
    if not content["images"]:
        problems.add("split without images", problems.path.name)
    _check_ids(content, problems)
    sizes = [_check_image(image, folder, problems) for image in content["images"]]
    images = {image["id"]: image for image in content["images"]}
    known = {c["id"] for c in content["categories"]}
    points = Counter(_num_keypoints(a) for a in content["annotations"] if "keypoints" in a)
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            problems.add("unknown image id", f"image id {annotation['image_id']}", annotation["id"])
            continue
        for kind in _annotation_problems(annotation, image, known, points):
            problems.add(kind, image["file_name"], annotation["id"])
    return sizes


def _check_ids(content: dict[str, Any], problems: Problems) -> None:
    for name in _LISTS:
        for repeated in _repeated(entry["id"] for entry in content[name]):
            problems.add(f"duplicate id in {name}", f"id {repeated}")
    for repeated in _repeated(c["name"] for c in content["categories"]):
        problems.add("duplicate category name", repeated)


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_image(image: dict[str, Any], folder: Path, problems: Problems) -> int:
    name = image["file_name"]
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if any(p.is_absolute() or p.drive or ".." in p.parts for p in paths):
        problems.add("file name that leaves the image folder", name)
        return 0
    path = folder / name
    if not path.is_file():
        problems.add(f"missing image file in {folder}", name)
        return 0
    try:
        size = upright_size(path, name)
    except ValueError:
        problems.add("image file that cannot be read", name)
        return 0
    if size != (image["width"], image["height"]):
        problems.add("image of another size than its label says", f"{name} ({size[0]} x {size[1]} px upright)")
    return path.stat().st_size


def _num_keypoints(annotation: dict[str, Any]) -> int:
    return len(annotation["keypoints"]) if isinstance(annotation["keypoints"], list) else -1


def _annotation_problems(
    annotation: dict[str, Any], image: dict[str, Any], categories: set[int], points: Counter[int]
) -> list[str]:
    found = [_box_problem(annotation["bbox"], image["width"], image["height"])]
    if annotation["category_id"] not in categories:
        found.append("unknown category id")
    if not _finite([annotation.get("area", 0)]):
        found.append("area that is not a number")
    if "keypoints" in annotation:
        count = _num_keypoints(annotation)
        whole = count > 0 and count % 3 == 0 and len(points) == 1
        found.append(None if whole and _finite(annotation["keypoints"]) else "unusable keypoints")
    return [kind for kind in found if kind is not None]


def _box_problem(box: list[Any], width: int, height: int) -> str | None:
    if len(box) != 4 or not _finite(box):
        return "box that is not four finite numbers"
    x, y, w, h = box
    if w < 0 or h < 0:
        return "reversed box (negative width or height)"
    if w == 0 or h == 0:
        return "box without area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box outside the image"
    return None


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, Real) and math.isfinite(v) for v in values)
