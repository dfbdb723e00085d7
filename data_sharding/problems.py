"""What is wrong with a data set, by kind: collected everywhere, told in one message or in one report.

Every plug-in and the packer use this one collector. A problem costs an annotation, an image or the whole split, or it
is a note, after which everything is still used. `on_bad` decides: `stop` raises once everything was looked at, `skip`
leaves out what is unusable and keeps the list for the report. What costs the whole split always stops.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from data_sharding.files import STAMP

OnBad = Literal["stop", "skip"]
Costs = Literal["split", "image", "annotation", "nothing"]
REPORT = "problems.json"
_FIRST = 10
_OPEN = b"{\n"


class BadImage(ValueError):
    """An image that cannot be used, found when its pixels were read."""

    def __init__(self, kind: str, file: str, detail: str = "") -> None:
        self.kind, self.file, self.detail = kind, file, detail
        super().__init__(f"{file}: {kind}" + (f" ({detail})" if detail else ""))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where."""

    costs: Costs
    """What cannot be used because of it. `nothing`: a note."""
    kind: str
    file: str
    """The image's file name, or the place in the label file where there is none."""
    annotation: str = ""
    """Its id or line; empty where the whole file is meant."""
    detail: str = ""

    @property
    def place(self) -> str:
        """Where it is, and what stands there, for a person."""
        where = f"{self.file} annotation {self.annotation}" if self.annotation else self.file
        return f"{where} ({self.detail})" if self.detail else where


class Problems:
    """The problems of one split."""

    def __init__(self, source: Path | str, on_bad: OnBad = "stop") -> None:
        """`source`: the label file or folder, for messages."""
        self.source = source
        self.on_bad: OnBad = on_bad
        self.found: list[Problem] = []

    def split(self, kind: str, file: object, detail: str = "") -> None:
        """Note what makes the whole split unusable, whatever `on_bad` says."""
        self.found.append(Problem("split", kind, str(file), "", detail))

    def image(self, kind: str, file: object, detail: str = "") -> None:
        """Note what makes an image unusable."""
        self.found.append(Problem("image", kind, str(file), "", detail))

    def annotation(self, kind: str, file: object, annotation: object, detail: str = "") -> None:
        """Note what makes one annotation unusable; its image can be used without it."""
        self.found.append(Problem("annotation", kind, str(file), str(annotation), detail))

    def note(self, kind: str, file: object, annotation: object = "", detail: str = "") -> None:
        """Note what is irregular and harmless: all of it is used, perhaps put right."""
        self.found.append(Problem("nothing", kind, str(file), str(annotation), detail))

    @property
    def stopping(self) -> bool:
        """Whether something was found that ends the packing."""
        return any(p.costs == "split" or (self.on_bad == "stop" and p.costs != "nothing") for p in self.found)

    def stop_if_any(self) -> None:
        """Raise one ValueError that counts every kind and names the first ten places, where `stopping`."""
        if not self.stopping:
            return
        bad = [p for p in self.found if p.costs != "nothing"]
        kinds = Counter(p.kind for p in bad)
        counts = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
        named = [f"{p.place}: {kind}" for kind in kinds for p in bad if p.kind == kind][:_FIRST]
        more = [f"and {len(bad) - _FIRST} more"] if len(bad) > _FIRST else []
        lines = "\n  ".join([f"{self.source} cannot be used: {counts}", *named, *more])
        skippable = all(p.costs != "split" for p in bad)
        what = "\nput these right, or set data.on_bad=skip to leave them out and have them listed" if skippable else ""
        raise ValueError(lines + what)


def report(split: str, on_bad: OnBad, found: Iterable[Problem]) -> bytes:
    """The report that lies beside the packed data: JSON with counts and one line per problem."""
    listed = list(found)
    head = {
        "split": split,
        "on_bad": on_bad,
        "images_skipped": sum(p.costs == "image" for p in listed),
        "annotations_skipped": sum(p.costs == "annotation" for p in listed),
        "notes": sum(p.costs == "nothing" for p in listed),
        "kinds": dict(Counter(p.kind for p in listed)),
    }
    lines = ",".join(f"\n  {json.dumps(asdict(p))}" for p in listed)
    start = json.dumps(head, indent=1).removesuffix("\n}")
    content = f'{start},\n "problems": [{lines}]\n}}\n'.encode()
    return _stamp(content) + content.removeprefix(_OPEN)


def checked_report(content: bytes) -> dict[str, Any]:
    """A report out of its file's bytes. ValueError where one of them has changed."""
    stamp, rest = content[: len(_stamp(b""))], _OPEN + content[len(_stamp(b"")) :]
    if stamp != _stamp(rest):
        raise ValueError(f"its first line should give the hash of the rest, {_stamp(rest).decode().split()[-1]}")
    return json.loads(rest)


def _stamp(content: bytes) -> bytes:
    return _OPEN + f' "{STAMP}": "{xxhash.xxh3_128_hexdigest(content)}",\n'.encode()


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a packed split. Raises ValueError where it is missing or damaged; packing again writes it anew."""
    path = folder / REPORT
    try:
        return checked_report(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); pack again: it is written anew") from error
