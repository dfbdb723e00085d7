"""The doctor on room: does a worker's memory hold the run, and do the disks hold what it writes."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.checkup import Area, Finding, size
from cluster.checkup_data import Labels
from cluster.checkup_machine import cores, memory
from cluster.checkup_sample import Sample
from cluster.checkup_steps import Bench, Dry
from cluster.config import RunConfig
from cluster.packing import SPLITS
from data_sharding.cache_cost import NotEnoughSpace, require_space
from data_sharding.cache_plan import estimate_bytes

FLOAT = 4
PROCESS = 1.0e9
"""Bytes of Python, torch, Ray, DeepSpeed and MLflow in a worker, before the first tensor; measured on Linux."""
CUDA_CONTEXT = 0.6e9
RECORD = 50e6
"""Bytes of a run's metrics, pictures, results and record."""
PROBE = 8 << 20
OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}
NETWORK = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "virtiofs", "9p", "fuse")


def examine_memory(config: RunConfig, bench: Bench, steps: Sequence[Dry]) -> Area:
    """What one worker needs, from the dry steps' own measurements; and whether all of this machine's fit."""
    rows = memory_rows(config, bench, steps)
    device = bench.device.type == "cuda"
    each = sum(int(bytes) for _, bytes, _ in rows)
    here = 1 if device else min(config.resources.workers, max(1, cores() // config.resources.threads))
    total = torch.cuda.get_device_properties(bench.device).total_memory if device else memory()
    whose = "its GPU" if device else f"this machine ({here} worker(s))"
    told = f"about {size(each)} per worker; {whose} has {size(total)}"
    table = [{"part of a worker": name, "size": size(bytes), "how": how} for name, bytes, how in rows]
    return Area(
        title="memory",
        findings=[_fits(config, rows, told, each * here, total)],
        tables=[("memory of a worker", table)],
    )


def memory_rows(config: RunConfig, bench: Bench, steps: Sequence[Dry]) -> list[tuple[str, float, str]]:
    """(part, bytes, how it was found) of one worker; ZeRO shares out optimizer, gradients and weights."""
    stage, workers, micro = config.resources.zero, config.resources.workers, config.micro_batch
    student = steps[0].student_parameters
    owned = student + sum(d.parameters - d.student_parameters for d in steps)
    assistants = sum(d.assistant_parameters for d in steps)
    teachers = sum(p.numel() for t in bench.loaded.values() for p in t.detector.parameters())
    kept = max(d.saved_bytes for d in steps)
    kept += sum(d.saved_bytes - min(e.saved_bytes for e in steps) for d in steps) if len(steps) > 1 else 0.0
    taps = sum(_tap_bytes(t) for t in bench.looks[0].taught.values()) / len(bench.batch)
    pixels = sum(x.nbytes for x in (bench.batch.images, *bench.batch.scaled_images.values())) / len(bench.batch)
    ahead = (config.resources.prefetch + 1) * micro * config.optim.accumulate

    def divided(least: int) -> int:
        return workers if stage >= least else 1

    states = OPTIMIZER_STATES[config.optim.optimizer] + (1 if stage > 0 else 0)
    rows = [
        ("process", CUDA_CONTEXT if bench.device.type == "cuda" else PROCESS, "libraries, estimated"),
        ("weights", owned * FLOAT / divided(3), f"{owned / 1e6:.2f} M of student and adapters"),
        ("gradients", owned * FLOAT / divided(2), f"ZeRO {stage}"),
        ("optimizer", owned * FLOAT * states / divided(1), f"{config.optim.optimizer}, ZeRO {stage}"),
        ("copies", student * FLOAT * (1 + (config.optim.ema is not None)), "for evaluation and averaging"),
        ("assistants", assistants * FLOAT * 4, "weights, gradients, Adam"),
        ("teachers", teachers * FLOAT, ", ".join(bench.loaded) or "none"),
        ("activations", kept * micro, f"{size(kept)} per image, measured, x {micro}"),
        ("batches ahead", (pixels + taps) * ahead, f"{ahead} images, prefetch {config.resources.prefetch}"),
    ]
    return [row for row in rows if row[1] > 0]


def _tap_bytes(taps: object) -> int:
    levels = [*getattr(taps, "pyramid", ()), getattr(taps, "c5", None)]
    return sum(level.nbytes for level in levels if level is not None)


def _fits(config: RunConfig, rows: Sequence[tuple[str, float, str]], told: str, needed: float, total: int) -> Finding:
    if needed < 0.85 * total:
        return Finding(check="memory", found=told)
    largest = max(rows, key=lambda row: row[1])[0]
    accumulate = next((n for n in range(config.optim.accumulate + 1, config.micro_batch * config.optim.accumulate + 1)
                       if (config.optim.batch // config.resources.workers) % n == 0), None)  # fmt: skip
    if largest in ("activations", "batches ahead") and accumulate is not None:
        fix = f"optim.accumulate={accumulate} (the same gradient in smaller pieces)"
    elif config.resources.workers > 1 and config.resources.zero < 2:
        fix = "resources.zero=2"
    else:
        fix = "a smaller student or canvas, or fewer workers on a machine"
    change = f"{told}, {largest} most of all: {fix}"
    return Finding(check="memory", found=told, verdict="FAIL" if needed > total else "warn", change=change)


def examine_disks(config: RunConfig, labels: Labels, sample: Sample, bench: Bench | None, steps: Sequence[Dry]) -> Area:
    """Whether `storage` can be written, is shared where it must be, and holds all that the run will write."""
    rows = disk_rows(config, labels, sample, bench, steps)
    storage = Path(config.storage).resolve()
    needed = sum(int(bytes) for _, bytes, _ in rows)
    findings = [_writable(storage), _shared(config, storage), _space(config, storage, needed, dict(_sizes(rows)))]
    table = [{"what is written": name, "size": size(bytes), "how": how} for name, bytes, how in rows]
    return Area(title="disks", findings=findings, tables=[(f"below {storage}", table)])


def disk_rows(
    config: RunConfig, labels: Labels, sample: Sample, bench: Bench | None, steps: Sequence[Dry]
) -> list[tuple[str, float, str]]:
    """(what, bytes, how it was estimated) of everything that the run will still write below `storage`."""
    images = {split: labels.sources[split].count for split in SPLITS}
    there = {split: (build.split_folder(config, split) / "manifest.json").exists() for split in SPLITS}
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
            if teacher.config.cache and config.distill:
                rows.append(_cache_row(config, bench, teacher, sample.train, images["train"]))
    if steps:
        states = 1 + OPTIMIZER_STATES[config.optim.optimizer] + (1 if config.resources.zero else 0)
        owned = steps[0].student_parameters * (1 + (config.optim.ema is not None)) + sum(
            (d.parameters - d.student_parameters) * states + 3 * d.assistant_parameters for d in steps
        )
        each = FLOAT * (owned + steps[0].student_parameters * (states - 1))
        rows.append(
            ("checkpoints", each * (config.resources.keep + 1), f"{config.resources.keep} kept, one being made")
        )
    return [*rows, ("metrics, record, results", RECORD, "estimated")]


def _sizes(rows: Sequence[tuple[str, float, str]]) -> list[tuple[str, float]]:
    return [(name, bytes) for name, bytes, _ in rows]


def _how(there: bool, images: int) -> str:
    return "there already" if there else f"{images} images, by the size of some"


def _cache_row(
    config: RunConfig, bench: Bench, teacher: LoadedTeacher, train: Split, images: int
) -> tuple[str, float, str]:
    """By the same plan as the real cache, on the sample, times the number of images."""
    student = build.build_student(config, bench.classes)
    key = build.cache_key(config, teacher, student.shapes, train)
    each = estimate_bytes(key, train.dataset, train.views) / (len(train.dataset) * train.views.config.count)
    samples = images * config.views.count
    how = f"{samples} samples ({config.views.count} view(s)), {size(each)} each, {teacher.config.codec}"
    return f"cache of {teacher.config.name}", each * samples, how


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
    alone = config.resources.workers * config.resources.threads <= cores()
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
            narrower = "" if config.teachers[largest].codec == "fp16" else f"teachers.{largest}.codec=fp16, "
            fix = f"teachers.{largest}.cache=false, {narrower}or {fix}"
        return Finding(check="disk space", found=told, verdict="FAIL", change=f"{error}: {fix}")
    return Finding(check="disk space", found=told)
