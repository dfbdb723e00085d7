"""From a checked recipe to the objects of a run: data, student, teachers, lessons. Used by every verb and worker."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.config import RunConfig, evaluation_views, to_tree
from cluster.grammar import ConfigError
from cluster.sections import TeacherConfig
from data_sharding.batch import Taps
from data_sharding.loader import order_of
from data_sharding.order import Order
from data_sharding.record import Category
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable
from data_sharding.world import World
from kd import checkpoint
from kd import student as student_files
from kd.assistants import AssistantTrainer
from kd.class_rows import choose
from kd.detectors.base import Detector, Shapes
from kd.distiller import Lesson
from kd.inherit import inherit
from kd.methods.base import Method, MethodConfig, Pair
from kd.plugins import plugin
from kd.teacher import LiveTeacher, TeacherHead, aligned_shapes, all_reads


@dataclass(frozen=True, kw_only=True)
class Split:
    """A packed split and its views."""

    dataset: PackedDataset
    views: ViewTable


@dataclass(frozen=True, kw_only=True)
class LoadedTeacher:
    """A teacher read from its folder, with what the recipe says of it."""

    config: TeacherConfig
    detector: Detector
    detector_config: object
    categories: tuple[Category, ...]
    sha256: str


def split_folder(config: RunConfig, split: str) -> Path:
    """Where a split is packed: one folder per data settings, shared by all runs in this storage."""
    settings = json.dumps(to_tree(config)["data"], sort_keys=True).encode()
    return Path(config.storage) / "data" / f"{config.data.name}-{hashlib.sha256(settings).hexdigest()[:12]}" / split


def open_split(config: RunConfig, split: str, views: ViewConfig) -> Split:
    """Open what `cluster.pack` wrote; ConfigError with the command where nothing was."""
    folder = split_folder(config, split)
    if not (folder / "manifest.json").exists():
        raise ConfigError(f"{folder}: split {split!r} is not packed yet; run `python -m cluster.pack` with this recipe")
    dataset = PackedDataset.open(folder)
    return Split(dataset=dataset, views=ViewTable.open_or_draw(dataset, views))


def open_train(config: RunConfig) -> Split:
    """The training images under the recipe's views."""
    return open_split(config, "train", config.views)


def open_val(config: RunConfig) -> Split:
    """The validation images, each rendered once, at the student's resolution."""
    return open_split(config, "val", evaluation_views(config))


def build_order(config: RunConfig, train: Split) -> Order:
    """The sequence of global batches, whatever the number of workers."""
    window, lanes = config.order.window, config.order.lanes
    return order_of(train.dataset, train.views, seed=config.seed, batch=config.optim.batch, window=window, lanes=lanes)


def build_student(config: RunConfig, num_classes: int) -> Detector:
    """The student with its first weights: a function of recipe and seed, whatever else the run holds."""
    with _own_randomness(config.seed, "student"):
        student = plugin("kd.detectors", config.student.name).build(config.student, num_classes)
    student.backbone.recompute = config.resources.activation_checkpointing
    return student


def begin_as_taught(student: Detector, teachers: Mapping[str, LoadedTeacher]) -> None:
    """Give the student what it inherits from its teachers, before its first step; ConfigError where shapes differ."""
    for teacher in teachers.values():
        try:
            inherit(student, teacher.detector, teacher.config.inherit)
        except ValueError as error:
            raise ConfigError(f"teachers: {teacher.config.name!r}: {error}") from None


def _new_student(config: RunConfig, num_classes: int) -> Detector:
    """A detector of the student's make with random weights, drawn from the generator of the moment."""
    return plugin("kd.detectors", config.student.name).build(config.student, num_classes, weights_follow=True)


def load_teacher(teacher: TeacherConfig, categories: tuple[Category, ...]) -> LoadedTeacher:
    """Read a teacher; strict, and it must know exactly the data set's classes in their order: by itself, or as the
    recipe's `classes` says. A checkpoint file of torchvision's is taken by the classes' names."""
    try:
        if teacher.weights.is_file():
            names = [c.name for c in categories]
            detector, settings = checkpoint.load(teacher.weights, names, teacher.classes)
            sha256 = student_files.weights_hash(detector)
        else:
            detector, settings, sha256 = _from_folder(teacher, categories)
    except FileNotFoundError as error:
        raise ConfigError(
            f"teachers: {teacher.name!r} is read from {teacher.weights}, where {error.filename} is missing; point "
            "teachers.N.weights at the `student` folder that a training run ends with, or at a checkpoint of "
            "torchvision's"
        ) from None
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"teachers: {teacher.name!r}: {error}") from None
    frozen = detector.eval().requires_grad_(False)
    return LoadedTeacher(
        config=teacher, detector=frozen, detector_config=settings, categories=categories, sha256=sha256
    )


def _from_folder(teacher: TeacherConfig, categories: tuple[Category, ...]) -> tuple[Detector, Any, str]:
    """A student of ours: the detector, its settings, and what identifies its weights."""
    detector, info = student_files.load(teacher.weights)
    mine, its = [c.name for c in categories], [c.name for c in info.categories]
    if teacher.classes:
        detector.keep_classes(choose(mine, teacher.classes, its, len(its), str(teacher.weights)))
        return detector, info.config, student_files.weights_hash(detector)
    if mine != its:
        differing = [
            f"{i}: data set {a!r}, teacher {b!r}" for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b
        ]
        raise ConfigError(
            f"teachers: {teacher.name!r} knows {len(its)} classes, the data set has {len(mine)}, and they must be the "
            f"same in the same order ({'; '.join(differing[:5]) or 'one list is longer'}); fine-tune the teacher on "
            "this data set with `distill={}`, or say with teachers.N.classes what it calls the data set's classes"
        )
    return detector, info.config, info.sha256


def reads_of(config: RunConfig) -> frozenset[str]:
    """The teacher's taps that the recipe's methods read."""
    return all_reads([plugin("kd.methods", name).Loss.reads for name in config.distill])


def stored_of(config: RunConfig, teacher: TeacherConfig) -> frozenset[str]:
    """The taps that this teacher's cache holds."""
    return reads_of(config) | frozenset(teacher.stores)


def live_teacher(
    teacher: LoadedTeacher,
    student: Shapes,
    reads: frozenset[str],
    features: Callable[[Tensor], Taps] | None = None,
    images: int = 1,
) -> LiveTeacher:
    """The teacher itself, answering on the student's grid. `features` and `images` are a sharded one's."""
    settings = teacher.config
    return LiveTeacher(
        teacher.detector,
        student,
        factor=settings.factor,
        rule=settings.align,
        reads=reads,
        precision=settings.precision,
        features=features,
        images=images,
    )


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What the student learns from its teachers, by lesson."""

    lessons: Mapping[str, tuple[Lesson, Method]]
    assistants: Mapping[str, AssistantTrainer]


def build_lessons(
    config: RunConfig, student: Shapes, teachers: Mapping[str, LoadedTeacher], world: World, device: torch.device
) -> Taught:
    """Every method with every teacher, or alone where it needs none, each with its own adapters and, where it has one,
    its own assistant."""
    lessons: dict[str, tuple[Lesson, Method]] = {}
    assistants: dict[str, AssistantTrainer] = {}
    for lesson in lessons_of(config, tuple(teachers)):
        teacher = None if lesson.teacher is None else teachers[lesson.teacher]
        pair = Pair(
            student=student,
            teacher=student if teacher is None else aligned_shapes(teacher.detector.shapes, student),
            world=world,
            accumulate=config.optim.accumulate,
            detector=partial(_new_student, config, student.num_classes),
        )
        module, name = plugin("kd.methods", lesson.name.rpartition("/")[2]), lesson.name
        with _own_randomness(config.seed, f"method {name}"):
            loss = module.Loss(lesson.config, pair)
        if teacher is not None and loss.needs_head:
            lesson = replace(lesson, head=TeacherHead(teacher.detector, student, teacher.config, device))
        lessons[name] = (lesson, loss)
        if _has_assistant(module, lesson.config):
            with _own_randomness(config.seed, f"assistant {name}"):
                assistants[name] = AssistantTrainer(module.Assistant(lesson.config, pair).to(device), world)
    return Taught(lessons=lessons, assistants=assistants)


def lessons_of(config: RunConfig, teachers: Sequence[str]) -> list[Lesson]:
    """The lessons of a run with these of the recipe's teachers: method by method of every teacher, then the methods
    that need none."""
    weights = {teacher.name: teacher.weight for teacher in config.teachers}
    taught = [
        Lesson(name=m if len(teachers) == 1 else f"{t}/{m}", teacher=t, config=settings, weight=weights[t])
        for t in teachers
        for m, settings in config.distill.items()
        if settings.taught
    ]
    alone = [Lesson(name=m, teacher=None, config=s) for m, s in config.distill.items() if not s.taught]
    return taught + alone


def _has_assistant(module: object, settings: MethodConfig) -> bool:
    return hasattr(module, "Assistant") and getattr(settings, "assisted", True)


@contextmanager
def _own_randomness(seed: int, purpose: str) -> Iterator[None]:
    """Weights drawn inside depend on (seed, purpose) alone, and nothing outside notices."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield
