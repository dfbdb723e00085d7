"""A student's ONNX file, the proof that it does what eager does, and how fast each way of running it is."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from cluster.grammar import ConfigError
from cluster.terminal import Report, progress
from data_sharding.images import decode
from kd import deploy
from kd import export as onnx_files
from kd.evaluation.speed import Latency, latency, measure

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be set; `cluster/export.py` tells users."""

    image: tuple[int, int] | None = None
    out: Path | None = None
    score: float | None = None
    repeats: int = 20
    threads: int = 1
    compile: bool = True

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __post_init__(self) -> None:
        if self.image is not None and min(self.image) < 1:
            raise ValueError(f"image must be (height, width) in pixels, got {list(self.image)}")
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"score must be in [0, 1], got {self.score}")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Done:
    """What an export left and measured."""

    path: Path
    speeds: list[dict[str, object]]
    facts: list[tuple[str, object]]


def export(student: Path, images: Sequence[Path], settings: Settings) -> Done:
    """Write the file, check it, time it. Raises ValueError, and leaves no file, where it differs from eager."""
    torch.set_num_threads(settings.threads)
    predictor, info = deploy.load(student, score=settings.score)
    probes = _probes(images, settings.image, predictor.views.buckets[0])
    path = settings.out or student / "student.onnx"
    with progress("export") as report:
        report(0, 4, "tracing and checking")
        parity = onnx_files.export(predictor, info, probes, path)
        speeds = _speeds(predictor, path, probes[0], settings, report)
    height, width = probes[0].shape[1:]
    view = predictor.view(height, width)
    size = measure(predictor.detector, view.canvas, repeats=1)
    facts: list[tuple[str, object]] = [
        ("image (h, w)", f"{height} x {width}"),
        ("resized inside to (h, w)", f"{view.size[0]} x {view.size[1]}"),
        ("canvas (h, w)", f"{view.canvas[0]} x {view.canvas[1]}"),
        ("parameters", f"{size.parameters / 1e6:.2f} M"),
        ("GFLOPs", size.gflops),
        ("file", f"{path.stat().st_size / 1e6:.1f} MB, opset {onnx_files.OPSET}"),
        ("checked against eager", f"{parity.boxes} boxes in {parity.images} image(s)"),
        ("largest difference, box", f"{parity.box_error:.1e} px"),
        ("largest difference, score", f"{parity.score_error:.1e}"),
    ]
    return Done(path=path, speeds=speeds, facts=facts)


def _probes(images: Sequence[Path], size: tuple[int, int] | None, canvas: tuple[int, int]) -> list[Tensor]:
    """The images that the file is checked on, all of one size; without any a photograph and noise."""
    read = [decode(path.read_bytes(), str(path)) for path in images]
    if not read:
        return _built_in(*(size or canvas))
    found = {(image.shape[1], image.shape[2]) for image in read}
    if len(found) > 1 or (size is not None and size not in found):
        raise ConfigError(
            f"one file takes images of one (height, width), {list(size) if size else 'any'} asked for; the images "
            f"named have {', '.join(str(list(one)) for one in sorted(found)[:5])}: name images of one size only"
        )
    return read


def _built_in(height: int, width: int) -> list[Tensor]:
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(np.array(load_sample_image("china.jpg"))).permute(2, 0, 1)
    rows = torch.arange(height) * photo.shape[1] // height
    columns = torch.arange(width) * photo.shape[2] // width
    noise = torch.Generator().manual_seed(0)
    return [
        photo[:, rows][:, :, columns].contiguous(),
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=noise),
    ]


def _speeds(
    predictor: deploy.Predictor, path: Path, image: Tensor, settings: Settings, report: Report
) -> list[dict[str, object]]:
    session = onnx_files.open_session(path, settings.threads)
    timed: dict[str, Callable[[], object]] = {
        "eager": lambda: predictor([image]),
        "ONNX Runtime": lambda: onnx_files.run(session, image),
    }
    rows = []
    for number, (name, work) in enumerate(timed.items(), start=1):
        report(number, 4, f"timing {name}")
        rows.append(_row(name, latency(work, CPU, settings.repeats)))
    if settings.compile:
        report(3, 4, "torch.compile compiles: a minute or more")
        rows.insert(1, _compiled(predictor, image, settings.repeats))
    report(4, 4)
    return rows


def _compiled(predictor: deploy.Predictor, image: Tensor, repeats: int) -> dict[str, object]:
    from torch._inductor.exc import InductorError

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells everyone who has no GPU
    fast = predictor.with_network(torch.compile(deploy.network))
    try:
        return _row("torch.compile", latency(lambda: fast([image]), CPU, repeats))
    except InductorError as error:
        if "No working C++ compiler" not in str(error):
            raise
        return {"runs in": "torch.compile", "note": "not timed: it needs a C++ compiler (g++), and there is none"}


def _row(name: str, found: Latency) -> dict[str, object]:
    return {
        "runs in": name,
        "ms (median)": 1000 * found.median,
        "ms (fastest)": 1000 * found.fastest,
        "images/s": 1 / found.median,
        "first run, s": found.first,
        "note": "",
    }
