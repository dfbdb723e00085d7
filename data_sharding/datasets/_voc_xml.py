"""One Pascal VOC annotation file, read from a stranger: no document type, hence no entities, is accepted."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.parsers import expat

from data_sharding.datasets._boxes import CLIPPED, box_problem, number, reaches_out
from data_sharding.problems import Problems

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_CHUNK = 256
_FROM_ZERO = "box at pixel 0, where VOC counts from 1 (its inner part is used; data.first_pixel=0 if all count from 0)"


class _HasDoctype(Exception):
    pass


@dataclass(frozen=True)
class Labelled:
    """A usable object."""

    number: int
    """Its place among the file's objects, from 1."""
    name: str
    box: tuple[float, float, float, float]
    """x1 y1 x2 y2 in pixels from 0, not clipped."""
    difficult: bool


def parse(data: bytes) -> ElementTree.Element:
    """The root of an annotation file. Raises ValueError for what is not VOC's XML or declares a document type."""

    def refuse(*_: object) -> None:
        raise _HasDoctype

    first_look = expat.ParserCreate()
    first_look.StartDoctypeDeclHandler = refuse
    try:
        # In small pieces, so that a declaration is refused before the entities behind it can unfold.
        for start in range(0, len(data), _CHUNK):
            first_look.Parse(data[start : start + _CHUNK], False)
        first_look.Parse(b"", True)
        root = ElementTree.fromstring(data)
    except _HasDoctype:
        raise ValueError("declares a document type, which annotations have no use for") from None
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not XML: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"not VOC's XML: the root is <{root.tag[:40]}>, not <annotation>")
    return root


def names_of(root: ElementTree.Element) -> set[str]:
    """The class names in a file."""
    return {name for node in root.findall("object") if (name := _text(node, "name"))}


def size_of(root: ElementTree.Element) -> tuple[int, int] | None:
    """The labelled (width, height), or None: some tools leave it out or write 0."""
    width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
    return (int(width), int(height)) if width >= 1 and height >= 1 else None


def objects_of(
    root: ElementTree.Element,
    file: str,
    size: tuple[int, int],
    *,
    known: Sequence[str],
    first_pixel: int,
    problems: Problems,
) -> list[Labelled]:
    """The usable objects; what is wrong with the others is noted. `file`: the image's, for messages. `known`: class
    names, ignored ones too. `first_pixel`: 1 as in VOC, where xmin and xmax are the first and last pixel of an object
    counted from 1, so that it covers [xmin - 1, xmax]; 0: the file holds x1 y1 x2 y2 already."""
    found: list[Labelled] = []
    for place, node in enumerate(root.findall("object"), start=1):
        kind, labelled = _object(node, place, size, known, first_pixel)
        if kind or labelled is None:
            problems.annotation(kind, file, f"object {place}", _text(node, "name")[:60])
            continue
        found.append(labelled)
        if reaches_out(labelled.box, *size):
            problems.note(_FROM_ZERO if _from_zero(labelled.box, first_pixel) else CLIPPED, file, f"object {place}")
    return found


def _object(
    node: ElementTree.Element, place: int, size: tuple[int, int], known: Sequence[str], first_pixel: int
) -> tuple[str, Labelled | None]:
    """What makes an object unusable, and the object where nothing does."""
    name, boxes, flag = _text(node, "name"), node.findall("bndbox"), _text(node, "difficult") or "0"
    if not name or len(boxes) != 1:
        return "object without one name and one box", None
    if name not in known:
        return "unknown class name", None
    if flag not in ("0", "1"):
        return "difficult that is neither 0 nor 1", None
    x1, y1, x2, y2 = (_number(boxes[0], corner) for corner in _CORNERS)
    box = (x1 - first_pixel, y1 - first_pixel, x2, y2)
    return box_problem(box, *size), Labelled(place, name, box, flag == "1")


def _from_zero(box: tuple[float, ...], first_pixel: int) -> bool:
    return first_pixel == 1 and min(box[:2]) == -1


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _number(node: ElementTree.Element, path: str) -> float:
    try:
        return number(float(_text(node, path)))
    except ValueError:
        return float("nan")
