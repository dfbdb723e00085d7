"""One VisDrone-DET label file: left,top,width,height,score,category,truncation,occlusion per line."""

from dataclasses import dataclass

from data_sharding.datasets._boxes import CLIPPED, box_problem, reaches_out
from data_sharding.problems import Problems

CLASSES = ("pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor")
"""Categories 1 to 10."""
IGNORED, OTHERS = 0, 11


@dataclass(frozen=True)
class Line:
    """A usable line."""

    number: int
    """From 1."""
    box: tuple[float, float, float, float]
    """x1 y1 x2 y2, not clipped."""
    category: int
    """0 to 11."""
    counts: bool
    """The line's score: without it the official toolkit ignores the object, and whatever is found there."""


def read_lines(data: bytes, name: str, size: tuple[int, int] | None, problems: Problems) -> list[Line]:
    """The usable lines of a label file; every irregular one is noted. `name`: the image's, for messages. `size`: its
    width and height; None: boxes are not compared with it."""
    text = data.decode("utf-8-sig", "replace")
    read = [
        _line(number, text_line.strip(), name, size, problems)
        for number, text_line in enumerate(text.split("\n"), start=1)
        if text_line.strip()
    ]
    return [line for line in read if line is not None]


def _line(number: int, text: str, name: str, size: tuple[int, int] | None, problems: Problems) -> Line | None:
    place = f"line {number}"
    fields = text.split(",")
    if len(fields) == 9 and not fields[8].strip():
        problems.note("trailing comma", name, place)
        fields.pop()
    values = [_whole(field) for field in fields]
    if len(values) != 8 or None in values:
        return problems.annotation("line that is not 8 whole numbers", name, place, text[:60])
    left, top, width, height, score, category, *_ = (v for v in values if v is not None)
    box = (float(left), float(top), float(left + width), float(top + height))
    limits = size if size is not None else (_FAR, _FAR)
    if kind := box_problem(box, *limits):
        return problems.annotation(kind, name, place, text)
    if not IGNORED <= category <= OTHERS:
        return problems.annotation("category outside 0..11", name, place, text)
    if score not in (0, 1):
        return problems.annotation("score that is neither 0 nor 1", name, place, text)
    if size is not None and reaches_out(box, *size):
        problems.note(CLIPPED, name, place)
    return Line(number, box, category, bool(score))


_FAR = 1 << 19


def _whole(field: str) -> int | None:
    """A whole number that a box may have; None for anything else."""
    digits = field.strip().removeprefix("-")
    return int(field) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None
