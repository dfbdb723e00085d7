"""Detections of a saved student on image files: COCO results, a list of the images, pictures."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from cluster.grammar import ConfigError
from cluster.student import annotating
from cluster.terminal import progress
from data_sharding.files import write_atomically
from data_sharding.images import decode
from kd import deploy
from kd.detectors.base import Detections
from kd.evaluation.coco import to_coco_results
from kd.slicing import SliceConfig, sliced
from kd.student import FACTS, StudentInfo

DETECTIONS, IMAGES, PICTURES = "detections.json", "images.json", "pictures"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be set; `cluster/predict.py` tells users."""

    out: Path = Path("predictions")
    score: float = 0.3
    slices: SliceConfig | None = None
    pictures: bool = True
    batch: int = 8
    threads: int = 1
    device: Literal["cpu", "cuda"] | None = None

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score must be in [0, 1], got {self.score}")
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass
class Done:
    """What a prediction did and left."""

    out: Path
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(height, width) by image id."""
    detections: dict[int, Detections] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    """Why an image could not be read, by its id."""
    seconds: float = 0.0
    """From the first file to the last picture."""
    looking: float = 0.0
    """Seconds spent from decoded pixels to final boxes."""

    def rows(self) -> Iterator[tuple[str, object]]:
        """The closing table."""
        yield "images", len(self.sizes)
        yield "broken images", len(self.broken)
        yield "boxes", sum(len(found.boxes) for found in self.detections.values())
        yield "seconds", f"{self.seconds:.1f}"
        yield "ms per image, pixels to boxes", f"{1000 * self.looking / max(1, len(self.sizes)):.1f}"
        yield "detections", self.out / DETECTIONS
        yield "list of images", self.out / IMAGES
        if (self.out / PICTURES).is_dir():
            yield "pictures", self.out / PICTURES


def base_of(student: Path) -> dict[str, Any]:
    """The settings that follow from the student: slices, as it was evaluated."""
    slices = json.loads((student / FACTS).read_text()).get("input", {}).get("slices")
    return {} if slices is None else {"slices": slices}


def predict(student: Path, images: Sequence[Path], settings: Settings) -> Done:
    """Look at every image and write all below `settings.out`. The id of an image is its place in `images`, from 1.
    What cannot be read is told and left out."""
    if not images:
        raise ConfigError("name at least one image file or folder of images")
    torch.set_num_threads(settings.threads)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor, info = deploy.load(student, device=device, batch=settings.batch)
    done, began = Done(settings.out), time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    with progress("predict") as report:
        for first in range(0, len(images), settings.batch):
            read = _read(dict(enumerate(images[first : first + settings.batch], start=first + 1)), done)
            found = _look(predictor, list(read.values()), settings, done)
            for number, one in zip(read, found, strict=True):
                done.sizes[number] = (read[number].shape[1], read[number].shape[2])
                done.detections[number] = one
                if settings.pictures:
                    _draw(read[number], one, info, _picture(settings.out, number, images[number - 1]))
            report(min(first + settings.batch, len(images)), len(images))
    _write(done, images, info)
    done.seconds = time.perf_counter() - began
    return done


def _read(paths: dict[int, Path], done: Done) -> dict[int, Tensor]:
    read: dict[int, Tensor] = {}
    for number, path in paths.items():
        try:
            read[number] = decode(path.read_bytes(), str(path))
        except (ValueError, OSError) as error:
            done.broken[number] = str(error)
            sys.stderr.write(f"{error}\n")
    return read


def _look(predictor: deploy.Predictor, images: list[Tensor], settings: Settings, done: Done) -> list[Detections]:
    began = time.perf_counter()
    slices = settings.slices
    found = predictor(images) if slices is None else [sliced(image, predictor, slices) for image in images]
    done.looking += time.perf_counter() - began
    return [_above(one, settings.score) for one in found]


def _above(found: Detections, score: float) -> Detections:
    keep = found.scores >= score
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep])


def _picture(out: Path, number: int, image: Path) -> Path:
    # The number tells apart images of one name from several folders.
    return out / PICTURES / f"{number:04d}_{image.stem}.jpg"


def _draw(image: Tensor, found: Detections, info: StudentInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [category.name for category in info.categories]
    annotating.annotated(image, found, names).save(path, quality=92, subsampling=0)


def _write(done: Done, images: Sequence[Path], info: StudentInfo) -> None:
    results = to_coco_results(done.detections, info.categories)
    listed = {
        "images": [
            {"id": number, "file_name": str(images[number - 1]), "height": height, "width": width}
            for number, (height, width) in done.sizes.items()
        ],
        "categories": [{"id": category.id, "name": category.name} for category in info.categories],
        "annotations": [],
        "broken": [
            {"id": number, "file_name": str(images[number - 1]), "error": error}
            for number, error in done.broken.items()
        ],
    }
    write_atomically(done.out / DETECTIONS, (json.dumps(results) + "\n").encode())
    write_atomically(done.out / IMAGES, (json.dumps(listed, indent=1) + "\n").encode())
