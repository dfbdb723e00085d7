"""Finds everything that is wrong with a COCO JSON file, before any of it is used."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_sharding.datasets._boxes import CLIPPED, box_problem, number, reaches_out
from data_sharding.datasets._image_files import look_at
from data_sharding.problems import Problems

_LISTS = ("images", "annotations", "categories")
_LARGEST = 2**63 - 1
_CONVERT = (
    "; `annotation` in the singular is HIT-UAV's native layout. Rewrite it once:\n"
    "  python -c \"import json, sys; d = json.load(open(sys.argv[1])); d['annotations'] = d.pop('annotation'); "
    "[i.update(file_name=i.pop('filename')) for i in d['images']]; json.dump(d, open(sys.argv[2], 'w'))\" "
    "{path} instances.json\nand give instances.json as annotations, with ignore_categories=[DontCare]"
)

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Usable:
    """What is left of a file when everything unusable is out."""

    images: list[Entry]
    """In the file's order."""
    sizes: list[int]
    """Bytes of each image file."""
    annotations: dict[int, list[Entry]]
    """Image id -> its annotations, in the file's order."""


def read_json(path: Path) -> dict[str, list[Any]]:
    """The lists images, annotations and categories of a COCO file; only the categories are checked.

    Raises ValueError where there is no file, for anything that is not COCO's layout, and for categories that are not
    clear.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"annotations {path}: no such file, or not readable ({type(error).__name__})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _LISTS):
        hint = _CONVERT.replace("{path}", str(path)) if "annotation" in found else ""
        raise ValueError(
            f"{path} is not COCO: expected an object with the lists {', '.join(_LISTS)}, found {str(found)[:200]}{hint}"
        )
    problems = Problems(path)
    _check_categories(content["categories"], problems)
    problems.stop_if_any()
    return {name: content[name] for name in _LISTS}


def check(content: dict[str, list[Any]], folder: Path, problems: Problems) -> Usable:
    """Note everything that makes images and annotations unusable; what is left without them."""
    named = [e for i, e in enumerate(content["images"]) if _is_image(e, i, problems)]
    single = _without_repeats(named, problems)
    looked = [(e, look_at(folder, e["file_name"], problems, (e["width"], e["height"]))) for e in single]
    images = [e for e, found in looked if found is not None]
    usable = Usable(
        images=images,
        sizes=[found[2] for _, found in looked if found is not None],
        annotations={image["id"]: [] for image in images},
    )
    if not usable.images:
        some = "usable " if content["images"] else ""
        problems.split(f"split without {some}images", Path(problems.source).name)
    _check_annotations(content, usable, problems)
    return usable


def _check_categories(categories: Sequence[Any], problems: Problems) -> None:
    for position, entry in enumerate(categories):
        if wrong := _wrong_fields(entry, {"id": int, "name": str}):
            problems.split(f"categories entry without a valid {wrong}", f"categories[{position}]")
    for field in ("id", "name"):
        known = [e[field] for e in categories if isinstance(e, dict) and isinstance(e.get(field), int | str)]
        for repeated in _repeated(known):
            kind = "duplicate id in categories" if field == "id" else "duplicate category name"
            problems.split(kind, f"id {repeated}" if field == "id" else repeated)


def _wrong_fields(entry: Any, fields: dict[str, type]) -> str:
    """The fields that an entry lacks, or that hold something else than asked."""

    def right(name: str, kind: type) -> bool:
        value = entry.get(name)
        return isinstance(value, kind) and (kind is not int or (type(value) is int and -_LARGEST <= value <= _LARGEST))

    return ", ".join(f for f, t in fields.items() if not (isinstance(entry, dict) and right(f, t)))


def _is_image(entry: Any, position: int, problems: Problems) -> bool:
    wrong = _wrong_fields(entry, {"id": int, "file_name": str, "width": int, "height": int})
    if wrong:
        problems.image(f"images entry without a valid {wrong}", f"images[{position}]")
    elif entry["id"] < 0:
        problems.image("negative image id", entry["file_name"], f"id {entry['id']}")
    return not wrong and entry["id"] >= 0


def _without_repeats(images: list[Entry], problems: Problems) -> list[Entry]:
    """The images that have an id and a file of their own. Of entries that are equal one stays; of different ones with
    one id none, for nobody can tell whose the annotations are; of different ids with one file the first."""
    first: dict[int, Entry] = {}
    differing = {e["id"] for e in images if first.setdefault(e["id"], e) != e}
    kept: dict[int, Entry] = {}
    files: set[PurePosixPath] = set()
    for image in images:
        number, name, file = image["id"], image["file_name"], PurePosixPath(image["file_name"])
        if number in differing or number in kept:
            problems.image("duplicate id in images", name, f"id {number}")
        elif file in files:
            problems.image("two images of one name", name, f"id {number}")
        else:
            kept[number] = image
            files.add(file)
    return list(kept.values())


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_annotations(content: dict[str, list[Any]], usable: Usable, problems: Problems) -> None:
    by_id = {image["id"]: image for image in usable.images}
    left_out = {e["id"] for e in content["images"] if isinstance(e, dict) and type(e.get("id")) is int} - by_id.keys()
    known = {c["id"] for c in content["categories"]}
    points = _usual_keypoints(content["annotations"])
    seen: set[int] = set()
    for position, entry in enumerate(content["annotations"]):
        wrong = _wrong_fields(entry, {"id": int, "image_id": int, "category_id": int, "bbox": list})
        if wrong:
            problems.annotation(f"annotations entry without a valid {wrong}", f"annotations[{position}]", "")
            continue
        if entry["image_id"] in left_out:
            continue  # its image is in the list of problems, with everything on it
        image = by_id.get(entry["image_id"])
        if image is None:
            problems.annotation("unknown image id", f"image id {entry['image_id']}", entry["id"])
            continue
        kinds = _annotation_problems(entry, image, known, points)
        kinds += ["duplicate id in annotations"] if entry["id"] in seen and not kinds else []
        for kind in kinds:
            problems.annotation(kind, image["file_name"], entry["id"])
        if not kinds:
            seen.add(entry["id"])
            usable.annotations[image["id"]].append(entry)
            if reaches_out(corners(entry["bbox"]), image["width"], image["height"]):
                problems.note(CLIPPED, image["file_name"], entry["id"])


def corners(box: Sequence[Any]) -> list[float]:
    """COCO's x y width height as x1 y1 x2 y2; NaN where there are no numbers."""
    if len(box) != 4:
        return []
    x, y, width, height = map(number, box)
    return [x, y, x + width, y + height]


def _usual_keypoints(annotations: Sequence[Any]) -> int:
    """How many numbers the key points of most annotations have."""
    given = [len(a["keypoints"]) for a in annotations if isinstance(a, dict) and isinstance(a.get("keypoints"), list)]
    return Counter(given).most_common(1)[0][0] if given else 0


def _annotation_problems(annotation: Entry, image: Entry, categories: set[int], points: int) -> list[str]:
    found = [box_problem(corners(annotation["bbox"]), image["width"], image["height"])]
    if annotation["category_id"] not in categories:
        found.append("unknown category id")
    if not number(annotation.get("area", 0)) >= 0:
        found.append("area that is not a number of at least 0")
    found += [f"{flag} that is neither 0 nor 1" for flag in ("iscrowd", "ignore") if not _is_flag(annotation, flag)]
    if "keypoints" in annotation:
        given = annotation["keypoints"]
        whole = isinstance(given, list) and points > 0 and points % 3 == 0 and len(given) == points
        found.append("" if whole and all(number(v) == number(v) for v in given) else "unusable keypoints")
    return [kind for kind in found if kind]


def _is_flag(annotation: Entry, name: str) -> bool:
    value = annotation.get(name, 0)
    return isinstance(value, int) and value in (0, 1)
