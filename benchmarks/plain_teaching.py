"""Who teaches in a run without recipes: the teacher, live or cached, the methods and their assistants."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from benchmarks.plain_setup import Randomness, Setup, Split, build_detector, open_split
from data_sharding.assemble import Assembler, Sample
from data_sharding.batch import Batch, Taps
from data_sharding.cache.key import CacheKey, library_versions
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.codecs.catalogue import codec
from data_sharding.codecs.choice import candidates, chosen, compared, is_open
from data_sharding.loader import NO_CACHES
from data_sharding.world import World
from kd import student as student_files
from kd.assistants import AssistantTrainer
from kd.detectors.base import Detector, Shapes
from kd.distiller import Lesson
from kd.methods.base import Method, Pair
from kd.plugins import plugin
from kd.teacher import CachedTeacher, LiveTeacher, Teacher, aligned_shapes, all_reads

TEACHER = "teacher"
TEACHER_BATCH = 8

Writing = Callable[[CacheWriter, Split, LiveTeacher], None]
"""Writes the shards that are missing."""


def fill_cache(setup: Setup, write: Writing | None = None) -> float:
    """Write the taps that `setup.methods` read, where that is not done yet; the seconds it took. `write`: another way
    than one batch after the other."""
    began = time.perf_counter()
    train_split = open_split(setup, "train", setup.views)
    student = build_detector(setup, train_split.dataset.categories).shapes
    _open_cache(setup, train_split, student, *_load_teacher(setup), write)
    return time.perf_counter() - began


def taught(
    setup: Setup, split: Split, student: Shapes
) -> tuple[Teacher | None, Mapping[str, TeacherCache], dict[str, tuple[Lesson, Method]], dict[str, AssistantTrainer]]:
    """The teacher, its cache, the methods and their assistants; nothing of it for a plain run."""
    if not setup.methods or setup.teaching is None:
        return None, NO_CACHES, {}, {}
    detector, sha256 = _load_teacher(setup)
    lessons: dict[str, tuple[Lesson, Method]] = {}
    assistants: dict[str, AssistantTrainer] = {}
    pair = Pair(student=student, teacher=aligned_shapes(detector.shapes, student), accumulate=setup.optim.accumulate)
    for name, config in setup.methods.items():
        module = plugin("kd.methods", name)
        with Randomness(setup.seed, f"method {name}"):
            lessons[name] = (Lesson(name=name, teacher=TEACHER, config=config), module.Loss(config, pair))
        if hasattr(module, "Assistant") and config.assisted:
            with Randomness(setup.seed, f"assistant {name}"):
                assistants[name] = AssistantTrainer(module.Assistant(config, pair).to(setup.device), World())
    if not setup.teaching.cached:
        return _live(setup, detector, student), NO_CACHES, lessons, assistants
    cache = _open_cache(setup, split, student, detector, sha256)
    return CachedTeacher(TEACHER, pair.teacher), {TEACHER: cache}, lessons, assistants


def _load_teacher(setup: Setup) -> tuple[Detector, str]:
    assert setup.teaching is not None
    detector, info = student_files.load(setup.teaching.folder)
    return detector.to(torch.device(setup.device)), info.sha256


def _reads(setup: Setup) -> frozenset[str]:
    return all_reads([plugin("kd.methods", name).Loss.reads for name in setup.methods])


def _live(setup: Setup, detector: Detector, student: Shapes) -> LiveTeacher:
    assert setup.teaching is not None
    teaching = setup.teaching
    return LiveTeacher(detector, student, factor=teaching.factor, rule=teaching.align, reads=_reads(setup))


def live_factors(setup: Setup) -> tuple[int, ...]:
    """The sizes at which the loader renders for a live teacher, beside the student's own."""
    live = setup.methods and setup.teaching is not None and not setup.teaching.cached
    return (setup.teaching.factor,) if live and setup.teaching is not None and setup.teaching.factor > 1 else ()


def _open_cache(
    setup: Setup, split: Split, student: Shapes, detector: Detector, sha256: str, write: Writing | None = None
) -> TeacherCache:
    """The cache of this teacher, views and taps; filled first where it is not complete."""
    key, asked = _cache_key(setup, split, detector, student, sha256)
    live = _live(setup, detector, student)
    taps_of = _taps_of(setup, split, live)
    if is_open(asked):
        key = replace(key, codecs=chosen(asked, compared(key, asked, split.dataset, split.views, taps_of)))
    folder = setup.storage / "caches" / key.uid[:12]
    if not (folder / "manifest.json").exists():
        writer = CacheWriter(folder, key, split.dataset, split.views)
        if write is not None:
            write(writer, split, live)
        for shard in writer.pending():
            writer.fill(shard, taps_of)
        writer.finish()
    return TeacherCache.open(folder, key)


def _taps_of(setup: Setup, split: Split, teacher: LiveTeacher) -> Callable[[np.ndarray, int], Taps]:
    """(image positions, view) -> what the teacher sees, as `CacheWriter.fill` asks."""
    assert setup.teaching is not None
    factor, device = setup.teaching.factor, torch.device(setup.device)
    pool = ThreadPoolExecutor(setup.threads)
    factors = (factor,) if factor > 1 else ()
    assembler = Assembler(
        dataset=split.dataset, views=split.views, pool=pool, further_factors=factors, caches=NO_CACHES
    )

    def taps_of(positions: np.ndarray, view: int) -> Taps:
        ids = split.dataset.image_ids
        batch: Batch = assembler.start([Sample(position=int(p), view=view, image_id=int(ids[p])) for p in positions])()
        taps = teacher(batch.to(device))
        return Taps(None if taps.c5 is None else taps.c5.cpu(), tuple(level.cpu() for level in taps.pyramid))

    return taps_of


def _cache_key(
    setup: Setup, split: Split, detector: Detector, student: Shapes, sha256: str
) -> tuple[CacheKey, list[str]]:
    """The key, with one of the codecs where `int8` or `sparse` leaves the choice open, and the codecs asked for."""
    assert setup.teaching is not None
    shapes, reads = aligned_shapes(detector.shapes, student), _reads(setup)
    levels = [(f"p{s.bit_length() - 1}", shapes.pyramid_channels, s) for s in shapes.strides]
    chosen = [("c5", shapes.c5_channels, shapes.c5_stride)] if "c5" in reads else []
    names, channels, strides = zip(*(chosen + (levels if "pyramid" in reads else [])), strict=True)
    asked = [setup.teaching.codec] * len(names)
    codecs = tuple(candidates(name)[-1] for name in asked)
    within = [m.reads_within for m in setup.methods.values() if m.reads_within is not None]
    key = CacheKey(
        dataset_uid=split.dataset.uid,
        views_uid=split.views.uid,
        teacher=TEACHER,
        weights_sha256=sha256,
        mean=tuple(detector.mean.tolist()),
        std=tuple(detector.std.tolist()),
        factor=setup.teaching.factor,
        align=setup.teaching.align,
        taps=names,
        channels=channels,
        strides=strides,
        canvases=tuple(split.views.buckets),
        codecs=codecs,
        enlarged=max(within) if any(codec(name).sparse for name in codecs) else None,
        batch=TEACHER_BATCH,
        versions=library_versions(),
    )
    return key, asked
