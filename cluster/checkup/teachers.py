"""The doctor on teachers: do their weights load, do they know the classes, do they find the objects."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.checkup.findings import Area, Finding
from cluster.checkup.sample import Sample
from cluster.config import RunConfig
from cluster.scoring import ground_truth, score
from cluster.sections import TeacherConfig
from cluster.terminal import progress
from data_sharding.record import Category
from data_sharding.world import World

SECONDS = 12.0
"""Spent at most on the AP of one teacher, about."""
LEAST_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Those that could be read, and what was found of all."""

    loaded: Mapping[str, LoadedTeacher]
    area: Area


def examine(config: RunConfig, sample: Sample, categories: tuple[Category, ...], device: torch.device) -> Teachers:
    """Load every teacher as a run would, and measure its AP on the sample's validation images, in its resolution."""
    loaded: dict[str, LoadedTeacher] = {}
    findings: list[Finding] = []
    for number, teacher in enumerate(config.teachers):
        check = f"teacher {teacher.name}"
        try:
            found = build.load_teacher(teacher, categories)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            change = str(error).replace("teachers.N.", f"teachers.{number}.")
            findings.append(Finding(check=check, found="cannot be read", verdict="FAIL", change=change))
            continue
        loaded[teacher.name] = found
        size = sum(p.numel() for p in found.detector.parameters()) / 1e6
        told = f"{size:.2f} M parameters, the data set's {len(categories)} classes, from {teacher.weights}"
        findings.append(Finding(check=check, found=told))
        findings.append(_gate(config, number, found, sample.val, device))
    return Teachers(loaded=loaded, area=Area(title="teachers", findings=findings))


def _gate(config: RunConfig, number: int, loaded: LoadedTeacher, val: Split, device: torch.device) -> Finding:
    """The gate on fewer images: below it is only worth a warning, far below it is not chance."""
    teacher = loaded.config
    images = _affordable(config, loaded, val, device)
    ap = _ap(config, loaded, val, images, device, told=True)
    check = f"gate of {teacher.name}"
    told = f"AP {ap:.1f} at {teacher.factor}x on {images} images; the gate is min_ap={teacher.min_ap:g}"
    if ap >= teacher.min_ap:
        return Finding(check=check, found=f"{told} on {teacher.gate_images}")
    fix = (
        f"{told}: check its weights, its pixel statistics and its training resolution, train it longer, or lower "
        f"teachers.{number}.min_ap knowingly"
    )
    return Finding(check=check, found=told, verdict="FAIL" if _hopeless(teacher, ap) else "warn", change=fix)


def _hopeless(teacher: TeacherConfig, ap: float) -> bool:
    """Less than half of the gate: no larger subset makes up for it."""
    return ap < teacher.min_ap / 2


def _affordable(config: RunConfig, loaded: LoadedTeacher, val: Split, device: torch.device) -> int:
    """How many images can be scored in `SECONDS`."""
    few = min(LEAST_IMAGES, len(val.dataset))
    began = time.perf_counter()
    _ap(config, loaded, val, few, device, told=False)
    each = (time.perf_counter() - began) / few
    return max(few, min(len(val.dataset), loaded.config.gate_images, int(SECONDS / each)))


def _ap(
    config: RunConfig, loaded: LoadedTeacher, val: Split, images: int, device: torch.device, *, told: bool
) -> float:
    detector, factor = loaded.detector.to(device), loaded.config.factor
    truth = ground_truth(val, images)

    def measure(report: object) -> float:
        return score(
            detector,
            val,
            truth,
            config.evaluation,
            world=World(),
            device=device,
            factor=factor,
            first=images,
            progress=report,  # pyright: ignore[reportArgumentType]
        ).metrics["AP"]

    if not told:
        return measure(None)
    with progress(f"teacher {loaded.config.name}") as report:
        return measure(report)
