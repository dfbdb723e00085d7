"""Whether a student and its teachers fit: one forward on a blank image, before anything expensive begins."""

from dataclasses import replace

import torch

from cluster import build
from cluster.build import LoadedTeacher
from cluster.config import RunConfig
from cluster.grammar import ConfigError
from data_sharding.batch import Batch, Geometry
from data_sharding.record import Category
from data_sharding.world import World
from kd.detectors.base import Detector
from kd.distiller import Distiller, Moment
from kd.step import global_totals

CANVAS = (128, 128)
"""One cell of the coarsest level."""


def require_fitting_pairs(config: RunConfig, categories: tuple[Category, ...]) -> None:
    """ConfigError that names both sides where a method cannot bring a teacher and the student together.

    Backbones, widths and families may differ: methods match channels and the teacher's levels are shifted or pooled.
    What remains are levels that cannot be had, and settings that contradict the shapes.
    """
    student = build.build_student(config, len(categories)).eval()
    for teacher in config.teachers if config.taught else ():
        loaded = build.load_teacher(teacher, categories)
        build.begin_as_taught(student, {teacher.name: loaded})
        try:
            _try(config, student, loaded)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"teachers: {teacher.name!r} ({_described(loaded.detector_config)}) cannot teach the student "
                f"({_described(config.student)}) at {teacher.factor}x with {' and '.join(config.distill)}: {error}"
            ) from None
    try:
        _try(config, student, None)
    except (ValueError, RuntimeError) as error:
        methods = " and ".join(name for name, settings in config.distill.items() if not settings.taught)
        raise ConfigError(
            f"distill: {methods} cannot go with the student ({_described(config.student)}): {error}"
        ) from None


def _try(config: RunConfig, student: Detector, loaded: LoadedTeacher | None) -> None:
    """The terms of every method that learns from this teacher, or from none, once, as in the middle of its time."""
    loaded_by_name = {} if loaded is None else {loaded.config.name: loaded}
    taught = build.build_lessons(config, student.shapes, loaded_by_name, World(), torch.device("cpu"))
    batch = _blank(1 if loaded is None else loaded.config.factor)
    reads = build.reads_of(config)
    live = {name: build.live_teacher(teacher, student.shapes, reads) for name, teacher in loaded_by_name.items()}
    for lesson, (settings, method) in taught.lessons.items():
        if (settings.teacher is None) != (loaded is None):
            continue
        distiller = Distiller(student, {lesson: (settings, method)}).eval()
        counted = batch.with_totals(global_totals(distiller, [batch], World()))
        assistants = {n: trainer for n, trainer in taught.assistants.items() if n == lesson}
        moment = Moment(progress=(settings.config.start + settings.config.stop) / 2)
        distiller(counted, {name: look(counted) for name, look in live.items()}, assistants, moment)


def _blank(factor: int) -> Batch:
    """One black image with one object."""
    images = torch.zeros(1, 3, *CANVAS, dtype=torch.uint8)
    made = Batch(
        images=images,
        geometry=Geometry(CANVAS, torch.tensor([CANVAS])),
        boxes=(torch.tensor([[32.0, 32.0, 80.0, 80.0]]),),
        labels=(torch.zeros(1, dtype=torch.int64),),
        ignore=(torch.zeros(0, 4),),
        image_ids=(0,),
        views=(0,),
    )
    large = torch.zeros(1, 3, *(side * factor for side in CANVAS), dtype=torch.uint8)
    return replace(made, scaled_images={factor: large})


def _described(settings: object) -> str:
    """`retinanet on resnet, P3 to P7, 256 wide`."""
    name, backbone = getattr(settings, "name", "?"), getattr(settings, "backbone", None)
    levels, width = getattr(settings, "levels", ()), getattr(settings, "width", "?")
    told = f"P{levels[0]} to P{levels[-1]}" if levels else "no levels"
    return f"{name} on {getattr(backbone, 'name', '?')}, {told}, {width} wide"
