"""The frame of the verbs that take a saved student: `python -m cluster.<verb> STUDENT [IMAGES ...] [key=value ...]`.

As for the verbs that take a recipe, arguments are read before anything heavy is imported.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.command import answered
from cluster.grammar import ConfigError, from_arguments, overlay

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
"""What is taken for an image in a folder; a file given by its own name is always tried."""
T = TypeVar("T")
_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the command line asks for."""

    student: Path
    images: tuple[Path, ...]
    """Files, in the order given; folders are replaced by their images in the order of their names."""
    settings: Mapping[str, Any]
    """Dotted key -> value."""


def command(
    verb: str, about: str, settings: str, act: Callable[[Order], int], arguments: Sequence[str] | None = None
) -> int:
    """Run a verb on the student and images that the command line names; the process's exit code, as `act` returns it
    or as `cluster.command` says."""
    parser = argparse.ArgumentParser(
        prog=f"python -m cluster.{verb}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=settings,
    )
    parser.add_argument("student", type=Path, help="the folder with student.safetensors and student.json")
    parser.add_argument("rest", nargs="*", metavar="image|key=value", help="image files or folders; settings")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    options = parser.parse_intermixed_args(arguments)
    return answered(lambda: act(_order(options.student, options.rest)), debug=options.debug)


def _order(student: Path, rest: Sequence[str]) -> Order:
    if not (student / "student.json").is_file():
        raise ConfigError(f"{student} holds no student.json; name the `student` folder that a training run ends with")
    settings = [text for text in rest if _SETTING.match(text) and not Path(text).exists()]
    images = [path for text in rest if text not in settings for path in _images(Path(text))]
    return Order(student=student, images=tuple(images), settings=from_arguments(settings))


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"no images in {path}; looked for {', '.join(SUFFIXES)}")
    return found


def settings_of(cls: type[T], base: Mapping[str, Any], order: Order) -> T:
    """The settings dataclass `cls` out of `base` with the command line's settings laid over; all mistakes at once."""
    import json

    from pydantic import TypeAdapter, ValidationError

    from cluster import mistakes

    tree = overlay(base, order.settings)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        found = mistakes.told(error, cls, tree)
        raise ConfigError("\n  ".join([f"{len(found)} mistake(s) in the settings", *found])) from None
