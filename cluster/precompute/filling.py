"""Fill the teacher caches of a recipe: Ray Data actors keep the teacher loaded and each write whole shards."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig, check, to_tree
from cluster.driver import require_resources, say, wants_gpu
from cluster.precompute.ahead import AheadOfWriting, give_way
from cluster.precompute.batches import Assembled
from cluster.precompute.keys import cache_folder, cache_key, settled_key
from cluster.precompute.places import cache_place, is_finished
from cluster.precompute.probe import measured_break_even
from cluster.repeatable import repeatable
from cluster.terminal import progress
from data_sharding.cache.cost import require_space
from data_sharding.cache.key import CacheKey
from data_sharding.cache.opening import MANIFEST
from data_sharding.cache.plan import estimate_bytes
from data_sharding.cache.writer import CacheWriter
from data_sharding.publish import publish
from data_sharding.remote import Remote, is_url
from kd.detectors.base import Detector

SHARDS_PER_CALL = 8


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A cache that is ready."""

    place: Path | str
    """A folder, or a URL."""
    key: CacheKey
    bytes: int
    seconds: float
    """Spent now; 0 for a cache that was there."""


def fill_caches(config: RunConfig, *, students: int = 1) -> dict[str, Filled]:
    """Fill or complete the cache of every cached teacher, for that many `students`. Ray is started."""
    if not config.taught:
        return {}
    train = build.open_train(config)
    student = build.build_student(config, len(train.dataset.categories))
    return {
        teacher.name: _fill(config, build.load_teacher(teacher, train.dataset.categories), student, train, students)
        for teacher in config.teachers
        if teacher.cache
    }


def _fill(config: RunConfig, teacher: LoadedTeacher, student: Detector, train: Split, students: int) -> Filled:
    key, compared = settled_key(config, teacher, student.shapes, train)
    if compared:
        say(f"codecs of teacher {key.teacher}, by what they err on its taps: {'; '.join(compared)}")
    folder, place = cache_folder(config, key), cache_place(config, key)
    if is_finished(config, key):
        return Filled(place=place, key=key, bytes=_size(place), seconds=0.0)
    began = time.perf_counter()
    if not (folder / MANIFEST).exists():
        _write(config, key, teacher, student, train, folder, students)
    if is_url(place):
        with progress(f"upload cache {key.teacher}") as report:
            publish(folder, Remote(str(place)), report)
    return Filled(place=place, key=key, bytes=_size(place), seconds=time.perf_counter() - began)


def _write(
    config: RunConfig, key: CacheKey, teacher: LoadedTeacher, student: Detector, train: Split, folder: Path,
    students: int,
) -> None:  # fmt: skip
    writer = CacheWriter(folder, key, train.dataset, train.views)
    pending = [number for number, shard in enumerate(writer.shards) if writer.receipt(shard) is None]
    if len(pending) == len(writer.shards):
        _announce(config, key, teacher, student, train, folder, students)
    if pending:
        _run_writers(config, teacher.config.name, [(n, len(writer.shards[n].positions)) for n in pending])
    writer.finish()


def _announce(
    config: RunConfig, key: CacheKey, teacher: LoadedTeacher, student: Detector, train: Split, folder: Path,
    students: int,
) -> None:  # fmt: skip
    """Say what it will take before the first byte; NotEnoughSpace where it does not fit."""
    needed = estimate_bytes(key, train.dataset, train.views)
    require_space(folder, needed)
    verdict = measured_break_even(config, key, teacher, student, train, folder, needed, students=students)
    count = len(train.dataset) * train.views.count
    codecs = ", ".join(dict.fromkeys(key.codecs))
    say(f"cache of teacher {key.teacher}: {needed / 1e6:.0f} MB for {count} samples ({codecs}), in {folder}")
    say(verdict.sentence)


def _run_writers(config: RunConfig, teacher: str, pending: list[tuple[int, int]]) -> None:
    """Give each pending shard to an actor; progress counts samples."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpu, threads = wants_gpu(config.resources.gpu, 1), config.resources.threads
    require_resources(1, threads, gpu)
    actors = actors_of(ray.cluster_resources(), gpu, threads, len(pending))
    rows = [{"shard": number, "samples": samples} for number, samples in pending]
    # Between two calls an actor's teacher waits for the first pixels and the last bytes: few calls, yet enough of
    # them for the actors to end together and for progress to be seen.
    each = max(1, min(SHARDS_PER_CALL, len(pending) // (8 * actors)))
    written = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // each)).map_batches(
        ShardWriter,
        fn_constructor_args=(to_tree(config), teacher),
        batch_size=each,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=threads,
        num_gpus=1 if gpu else 0,
    )
    with progress(f"cache {teacher}") as report:
        done, all_samples = 0, sum(samples for _, samples in pending)
        report(0, all_samples)
        for row in written.iter_rows():
            done += int(row["samples"])
            report(done, all_samples)


def actors_of(cluster: Mapping[str, float], gpu: bool, threads: int, pending: int) -> int:
    """As many as the whole cluster can hold, one per GPU where it has any, and none without a shard to write."""
    room = int(cluster.get("GPU", 0)) if gpu else int(cluster.get("CPU", 1)) // threads
    return max(1, min(room, pending))


class ShardWriter:
    """A Ray Data actor: the teacher stays loaded, each call writes whole shards."""

    def __init__(self, tree: Mapping[str, Any], teacher: str) -> None:
        config = check(tree, source="the driver's recipe")
        # Rounding may depend on the number of threads: one number for all writers.
        torch.set_num_threads(config.resources.threads)
        repeatable(config.deterministic)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train = build.open_train(config)
        categories = train.dataset.categories
        student = build.build_student(config, len(categories)).shapes
        settings = next(t for t in config.teachers if t.name == teacher)
        loaded = build.load_teacher(settings, categories)
        key = cache_key(config, loaded, student, train)
        self._writer = CacheWriter(cache_folder(config, key), key, train.dataset, train.views)
        loaded.detector.to(device)
        live = build.live_teacher(loaded, student, build.stored_of(config, settings))
        assembled = Assembled(train, settings.factor, initializer=give_way)
        self._ahead = AheadOfWriting(assembled, live, device)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._ahead.fill(self._writer, [self._writer.shards[int(number)] for number in rows["shard"]])
        return rows


def _size(place: Path | str) -> int:
    if is_url(place):
        return sum(Remote(str(place)).sizes().values())
    return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
