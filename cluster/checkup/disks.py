"""The doctor on disks: can `storage` be written, do all machines see it, does it hold what the run will write."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.checkup.data import Labels
from cluster.checkup.findings import Area, Finding, size
from cluster.checkup.machine import cores
from cluster.checkup.memory import FLOAT, OPTIMIZER_STATES
from cluster.checkup.sample import Sample
from cluster.checkup.steps import Bench, Dry
from cluster.config import RunConfig
from cluster.grammar import ConfigError
from cluster.packing import SPLITS
from cluster.precompute.keys import cache_key, largest_key
from cluster.precompute.places import is_finished
from data_sharding.cache.cost import NotEnoughSpace, require_space
from data_sharding.cache.plan import estimate_bytes
from data_sharding.shards import MANIFEST
from data_sharding.views import table_path
from kd.detectors.base import Detector

RECORD = 50e6
"""Bytes of a run's metrics, pictures, results and record."""
PROBE = 8 << 20
NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "virtiofs", "9p", "fuse")
Row = tuple[str, float, str]
"""What is written, its bytes, and how that is known."""


def examine(config: RunConfig, labels: Labels, sample: Sample, bench: Bench | None, steps: Sequence[Dry]) -> Area:
    """Whether `storage` can be written, is shared where it must be, and holds all that the run will write."""
    rows = disk_rows(config, labels, sample, bench, steps)
    storage = Path(config.storage).resolve()
    needed = sum(int(bytes) for _, bytes, _ in rows)
    findings = [
        _writable(storage),
        _shared(config, storage),
        _space(config, storage, needed, {name: bytes for name, bytes, _ in rows}),
    ]
    table = [{"what is written": name, "size": size(bytes), "how": how} for name, bytes, how in rows]
    return Area(title="disks", findings=findings, tables=[(f"below {storage}", table)])


def disk_rows(
    config: RunConfig, labels: Labels, sample: Sample, bench: Bench | None, steps: Sequence[Dry]
) -> list[Row]:
    """Everything that the run will still write below `storage`."""
    images = {split: labels.sources[split].count for split in SPLITS}
    there = {split: (build.split_folder(config, split) / MANIFEST).exists() for split in SPLITS}
    rows = [
        (
            f"packed {split}",
            0.0 if there[split] else sample.row_bytes * images[split],
            _how(there[split], images[split]),
        )
        for split in SPLITS
    ]
    if bench is not None:
        for teacher in bench.loaded.values():
            if teacher.config.cache and config.taught:
                rows.append(_cache_row(config, bench, teacher, sample.train, images["train"]))
    if steps:
        rows.append(_checkpoint_row(config, steps))
    return [*rows, ("metrics, record, results", RECORD, "estimated")]


def _checkpoint_row(config: RunConfig, steps: Sequence[Dry]) -> Row:
    """Weights and optimizer, DeepSpeed's own copy of the weights where it shards, the average and the assistants."""
    student = steps[0].student_parameters
    owned = student + sum(d.parameters - d.student_parameters for d in steps)
    states = 1 + OPTIMIZER_STATES[config.optim.optimizer] + (1 if config.resources.zero else 0)
    average = student if config.optim.ema is not None else 0
    each = FLOAT * (owned * states + average + 3 * sum(d.assistant_parameters for d in steps))
    keep = config.resources.keep
    return "checkpoints", float(each * (keep + 1)), f"{keep} kept and one being made, {size(each)} each"


def _how(there: bool, images: int) -> str:
    return "there already" if there else f"{images} images, by the size of some"


def _cache_row(config: RunConfig, bench: Bench, teacher: LoadedTeacher, train: Split, images: int) -> Row:
    """By the same plan as the real cache, on the sample, times the number of images."""
    student = build.build_student(config, bench.classes)
    if _is_filled(config, teacher, student):
        return f"cache of {teacher.config.name}", 0.0, "there already"
    key, asked = largest_key(config, teacher, student.shapes, train)
    each = estimate_bytes(key, train.dataset, train.views) / (len(train.dataset) * train.views.config.count)
    samples = images * config.views.count
    how = f"{samples} samples ({config.views.count} view(s)), {size(each)} each, {', '.join(dict.fromkeys(asked))}"
    return f"cache of {teacher.config.name}", each * samples, how


def _is_filled(config: RunConfig, teacher: LoadedTeacher, student: Detector) -> bool:
    """Whether an earlier run left this very cache; nothing is packed or drawn to find out."""
    packed = build.split_folder(config, "train")
    if not (packed / MANIFEST).exists() or not table_path(packed, config.views).exists():
        return False
    try:
        key = cache_key(config, teacher, student.shapes, build.open_train(config))
    except ConfigError:  # its codecs were not compared yet
        return False
    return is_finished(config, key)


def _narrower(config: RunConfig, teacher: int) -> str:
    """The smallest codec that the methods can learn from, where the recipe has a larger one."""
    smallest = "sparse" if all(method.sparse_suffices for method in config.distill.values()) else "int8"
    return "" if config.teachers[teacher].codec.startswith(smallest) else f"teachers.{teacher}.codec={smallest}, "


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _writable(storage: Path) -> Finding:
    """Write, lock, sync and rename a file, as packing, MLflow's database and checkpoints do."""
    where = _existing(storage)
    try:
        with tempfile.TemporaryDirectory(prefix=".minnow_doctor_", dir=where) as folder:
            path, began = Path(folder) / "probe", time.perf_counter()
            with path.open("wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write(os.urandom(PROBE))
                file.flush()
                os.fsync(file.fileno())
            path.replace(path.with_suffix(".moved"))
            speed = PROBE / (time.perf_counter() - began)
    except OSError as error:
        change = f"{where}: {error.strerror or error}; choose a folder that can be written and locked: storage=..."
        return Finding(check="storage", found=f"{where} cannot be used", verdict="FAIL", change=change)
    return Finding(check="storage", found=f"{storage} can be written, synced and locked, {speed / 1e6:.0f} MB/s")


def _shared(config: RunConfig, storage: Path) -> Finding:
    """Several machines need storage that all of them see; a guess by the kind of the file system."""
    where = _existing(storage)
    mounts = [p for p in psutil.disk_partitions(all=True) if where.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    kind = mount.fstype if mount is not None else "unknown"
    told = f"{kind} file system"
    alone = config.resources.most_workers * config.resources.threads <= cores()
    if alone or kind.startswith(NETWORK):
        return Finding(check="shared storage", found=f"{told}{', enough for one machine' if alone else ''}")
    change = f"{told} of this machine, and the workers need several: storage=... on NFS or the like"
    return Finding(check="shared storage", found=told, verdict="warn", change=change)


def _space(config: RunConfig, storage: Path, needed: int, sizes: dict[str, float]) -> Finding:
    free = shutil.disk_usage(_existing(storage)).free
    told = f"{size(needed)} will be written, {size(free)} are free"
    try:
        require_space(storage, needed)
    except NotEnoughSpace as error:
        caches = {i: sizes.get(f"cache of {t.name}", 0.0) for i, t in enumerate(config.teachers)}
        largest = max(caches, key=lambda i: caches[i], default=None)
        fix = "storage=... on a larger disk"
        if largest is not None and caches[largest] > needed / 2:
            fix = f"teachers.{largest}.cache=false, {_narrower(config, largest)}or {fix}"
        return Finding(check="disk space", found=told, verdict="FAIL", change=f"{error}: {fix}")
    return Finding(check="disk space", found=told)
