"""One training run in one process, without Ray, DeepSpeed or recipes: what benchmarks and experiments are made of.

`train` is the whole of it: data, student, teacher (live or cached), step, evaluation. Its parts are the ones that the
cluster uses; only the loop is its own.
"""

import ctypes
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_sharding.assemble import Assembler, Sample
from data_sharding.batch import Batch, Taps
from data_sharding.cache.key import CacheKey, library_versions
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.codecs.catalogue import codec
from data_sharding.codecs.choice import candidates, chosen, compared, is_open
from data_sharding.loader import NO_CACHES, Loader, evaluation_batches, order_of
from data_sharding.pack import pack
from data_sharding.record import Category
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable
from data_sharding.world import World
from kd import student as student_files
from kd.assistants import AssistantTrainer
from kd.blocks.align import Rule
from kd.clock import Clock
from kd.detectors.base import Detections, Detector, Shapes
from kd.distiller import Distiller, Lesson
from kd.engine import PlainEngine, Precision
from kd.evaluation import coco
from kd.evaluation.truth import GroundTruth
from kd.methods.base import Method, MethodConfig, Pair
from kd.optimise import Ema, OptimConfig
from kd.plugins import plugin
from kd.step import train_step
from kd.teacher import CachedTeacher, LiveTeacher, Teacher, aligned_shapes, all_reads

TEACHER = "teacher"
TEACHER_BATCH = 8
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True, kw_only=True)
class Split:
    """A packed split and its views."""

    dataset: PackedDataset
    views: ViewTable


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """Who teaches, and how."""

    folder: Path
    """What `kd.student.save` wrote."""
    factor: int = 2
    align: Rule = "shift"
    cached: bool = True
    codec: str = "fp16"
    """Of all taps; `int8` and `sparse` are measured on this teacher, as in a recipe."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One run. Everything that is trained or drawn depends on these values alone."""

    data: Any
    """A data set plug-in's Config; it names the plug-in."""
    storage: Path
    """Where packed splits and caches lie; shared by runs."""
    views: ViewConfig
    evaluation_views: ViewConfig
    detector: Any
    """A detector plug-in's Config: who is trained."""
    optim: OptimConfig
    methods: Mapping[str, MethodConfig] = field(default_factory=dict)
    teaching: Teaching | None = None
    seed: int = 0
    precision: Precision = "fp32"
    device: str = "cpu"
    threads: int = 1
    """Of the loader."""
    max_dets: tuple[int, ...] = (1, 10, 100)
    evaluation_batch: int = 16
    factor: int = 1
    """Resolution of the final evaluation, as a multiple of `evaluation_views`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came out of a run."""

    detector: Detector
    metrics: dict[str, float]
    """AP and its relatives, 0..100."""
    seconds: float
    """Wall time of the training steps alone: neither packing nor the cache nor the evaluation."""
    cpu_seconds: float
    """Processor time of this process over the same steps."""
    history: list[dict[str, float]]
    """The metrics of every step."""

    def mean(self, name: str, last: float = 0.5) -> float:
        """The mean of a logged number over the last part of the run; 0 where it was never logged."""
        part = self.history[int(len(self.history) * (1 - last)) :]
        found = [entry[name] for entry in part if name in entry]
        return sum(found) / len(found) if found else 0.0

    def shares(self) -> dict[str, float]:
        """Mean share of every distillation term in the task loss, over the second half of the run."""
        names = sorted({n for entry in self.history for n in entry if n.startswith("share/")})
        return {name.removeprefix("share/"): self.mean(name) for name in names}


Progress = Callable[[int, dict[str, float]], None]


def open_split(setup: Setup, split: str, views: ViewConfig) -> Split:
    """Pack the split where that is not done yet, and open it under `views`."""
    module: Any = plugin("data_sharding.datasets", setup.data.name)
    source = module.source(setup.data, split)
    folder = setup.storage / "data" / f"{setup.data.name}-{source.fingerprint[:12]}" / split
    packed = (folder / "manifest.json").exists()
    dataset = PackedDataset.open(folder) if packed else pack(setup.data, module, split, folder, shard_bytes=4 << 20)
    return Split(dataset=dataset, views=ViewTable.open_or_draw(dataset, views))


def build_detector(setup: Setup, categories: tuple[Category, ...]) -> Detector:
    """The detector with its first weights: a function of settings and seed."""
    with _Randomness(setup.seed, "student"):
        detector = plugin("kd.detectors", setup.detector.name).build(setup.detector, len(categories))
    return detector.to(torch.device(setup.device), memory_format=torch.channels_last)


def train(
    setup: Setup, progress: Progress | None = None, evaluate_every: int | None = None, evaluated: bool = True
) -> Run:
    """Train `setup.detector` and evaluate it on the split `val`, unless asked not to."""
    train_split, device = open_split(setup, "train", setup.views), torch.device(setup.device)
    student = build_detector(setup, train_split.dataset.categories).train()
    teacher, caches, lessons, assistants = taught(setup, train_split, student.shapes)
    distiller = Distiller(student, lessons).to(device)
    engine = PlainEngine(distiller, setup.optim, precision=setup.precision)
    ema = None if setup.optim.ema is None else Ema(student, setup.optim.ema)
    order = order_of(train_split.dataset, train_split.views, seed=setup.seed, batch=setup.optim.batch)
    history: list[dict[str, float]] = []
    spent = cpu = 0.0
    with Loader(
        train_split.dataset, train_split.views, order, world=World(), accumulate=setup.optim.accumulate,
        factors=live_factors(setup), caches=caches, threads=setup.threads, pin=device.type == "cuda",
    ) as loader:  # fmt: skip
        for step in range(setup.optim.steps):
            began, began_cpu = time.perf_counter(), time.process_time()
            batches = [batch.to(device) for batch in next(loader)]
            teachers = {TEACHER: teacher} if teacher is not None else {}
            report = train_step(engine, batches, teachers, assistants, setup.optim, step, World(), Clock())
            if ema is not None:
                ema.update(student, step)
            spent += time.perf_counter() - began
            cpu += time.process_time() - began_cpu
            history.append(report.metrics())
            done = step + 1
            if evaluate_every and done % evaluate_every == 0 and done < setup.optim.steps:
                history[-1]["val/AP"] = evaluate(student, setup)["AP"]
                student.train()
            if progress is not None:
                progress(done, history[-1])
    if ema is not None:
        student.load_state_dict(ema.state_dict())
    metrics = evaluate(student, setup, factor=setup.factor) if evaluated else {}
    return Run(detector=student, metrics=metrics, seconds=spent, cpu_seconds=cpu, history=history)


@torch.no_grad()
def evaluate(detector: Detector, setup: Setup, factor: int = 1) -> dict[str, float]:
    """COCO's numbers in 0..100 of `detector`, left in eval mode, at `factor` times the evaluation's resolution."""
    split, device = open_split(setup, "val", setup.evaluation_views), torch.device(setup.device)
    dataset, detector = split.dataset, detector.to(device).eval()
    truth = GroundTruth.from_records((dataset.record(i) for i in range(len(dataset))), dataset.categories)
    sizes = dict(zip(dataset.image_ids.tolist(), zip(dataset.heights, dataset.widths, strict=True), strict=True))
    found: dict[int, Detections] = {}
    batches = evaluation_batches(
        dataset, split.views, world=World(), batch=setup.evaluation_batch, factor=factor, threads=setup.threads
    )
    for batch in batches:
        moved = batch.to(device)
        taps = detector.features(detector.normalise(moved.images, moved.geometry))
        detections = detector.detect(detector.predict(taps.pyramid, moved.geometry), moved.geometry)
        for image, valid, one in zip(batch.image_ids, batch.geometry.sizes.tolist(), detections, strict=True):
            if image >= 0:
                height, width = sizes[image]
                there = coco.to_original(one, (valid[0], valid[1]), (int(height), int(width)))
                found[image] = Detections(there.boxes.cpu(), there.scores.cpu(), there.labels.cpu())
    raw = coco.evaluate(truth, found, max_dets=setup.max_dets)
    return {name: value if value < 0 else 100 * value for name, value in raw.items()}


Writing = Callable[[CacheWriter, "Split", LiveTeacher], None]
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
        with _Randomness(setup.seed, f"method {name}"):
            lessons[name] = (Lesson(name=name, teacher=TEACHER, config=config), module.Loss(config, pair))
        if hasattr(module, "Assistant") and config.assisted:
            with _Randomness(setup.seed, f"assistant {name}"):
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
    from concurrent.futures import ThreadPoolExecutor

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


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed. By default it returns every large tensor to the system, which hands it out
    again zeroed page by page: a third of a step on a CPU. Nothing happens where the C library is another one."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)


class _Randomness:
    """Weights drawn inside depend on (seed, purpose) alone, and nothing outside notices."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
        self._fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)
