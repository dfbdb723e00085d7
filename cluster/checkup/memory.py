"""The doctor on memory: what a worker needs, from the dry steps' own measurements."""

from collections.abc import Sequence

import torch

from cluster.build import LoadedTeacher
from cluster.checkup.findings import Area, Finding, size
from cluster.checkup.machine import cores, memory
from cluster.checkup.steps import Bench, Dry
from cluster.config import RunConfig
from cluster.sharded_teacher import SHARED_OUT

FLOAT = 4
PROCESS = 1.0e9
"""Bytes of Python, torch, Ray, DeepSpeed and MLflow in a worker, before the first tensor: an estimate."""
CUDA_CONTEXT = 0.6e9
ROOMY = 0.85
"""Of the memory that is there: what may be planned with."""
OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}
"""Numbers that an optimizer keeps per weight."""


def examine(config: RunConfig, bench: Bench, steps: Sequence[Dry]) -> Area:
    """What one worker needs, from the dry steps' own measurements; and whether all of this machine's fit."""
    rows = memory_rows(config, bench, steps)
    device = bench.device.type == "cuda"
    each = sum(int(bytes) for _, bytes, _ in rows)
    here = 1 if device else min(config.resources.most_workers, max(1, cores() // config.resources.threads))
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
    stage, workers, micro = config.resources.zero, config.resources.least_workers, config.micro_batch
    student = steps[0].student_parameters
    owned = student + sum(d.parameters - d.student_parameters for d in steps)
    assistants = sum(d.assistant_parameters for d in steps)
    teachers = sum(_numbers(t, workers) for t in bench.loaded.values())
    host = config.resources.offload and bench.device.type == "cuda"
    least = min(d.saved_bytes for d in steps)  # the student's own, and at most so much of a method's
    kept = least + sum(d.saved_bytes - least for d in steps)
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
        ("optimizer", 0 if host else owned * FLOAT * states / divided(1), f"{config.optim.optimizer}, ZeRO {stage}"),
        ("copies", student * FLOAT * (1 + (config.optim.ema is not None)), "for evaluation and averaging"),
        ("assistants", assistants * FLOAT * 4, "weights, gradients, Adam"),
        ("teachers", teachers * FLOAT, ", ".join(bench.loaded) or "none"),
        ("activations", kept * micro, f"{size(kept)} per image, measured, x {micro}"),
        ("batches ahead", (pixels + taps) * ahead, f"{ahead} images, prefetch {config.resources.prefetch}"),
    ]
    return [row for row in rows if row[1] > 0]


def _numbers(teacher: LoadedTeacher, workers: int) -> float:
    """Weights that one worker keeps: a sharded teacher's head stays whole."""
    whole = sum(p.numel() for p in teacher.detector.parameters())
    if not teacher.config.shard:
        return whole
    parts = [part for name, part in teacher.detector.named_children() if name in SHARED_OUT]
    cut = sum(p.numel() for part in parts for p in part.parameters())
    return whole - cut + cut / workers


def _tap_bytes(taps: object) -> int:
    levels = [*getattr(taps, "pyramid", ()), getattr(taps, "c5", None)]
    return sum(level.nbytes for level in levels if level is not None)


def _fits(config: RunConfig, rows: Sequence[tuple[str, float, str]], told: str, needed: float, total: int) -> Finding:
    if needed < ROOMY * total:
        return Finding(check="memory", found=told)
    largest = max(rows, key=lambda row: row[1])[0]
    share = config.optim.batch // config.resources.least_workers
    pieces = (n for n in range(config.optim.accumulate + 1, share + 1) if share % n == 0)
    accumulate = next(pieces, None)
    if largest in ("activations", "batches ahead") and accumulate is not None:
        fix = f"optim.accumulate={accumulate} (the same gradient in smaller pieces)"
    elif config.resources.least_workers > 1 and config.resources.zero < 2:
        fix = "resources.zero=2"
    else:
        fix = "a smaller student or canvas, or fewer workers on a machine"
    change = f"{told}, {largest} most of all: {fix}"
    return Finding(check="memory", found=told, verdict="FAIL" if needed > total else "warn", change=change)
