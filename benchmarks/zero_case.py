"""One rank of one case of `benchmarks.zero`: a worker of the cluster, its steps measured."""

import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cluster.ranks.memory import STATUS, forget_peak, peak_bytes
from cluster.ranks.traffic import Traffic
from cluster.scoring import score
from cluster.sharded_teacher import shard_bytes
from cluster.worker import Job, Worker
from cluster.zero import ZeroEngine, kept_collectives
from data_sharding.batch import Batch
from data_sharding.world import World
from kd.step import StepReport

CPU = torch.device("cpu")


def measured(world: World, tree: dict[str, Any], folder: str, steps: int) -> dict[str, float]:
    """Bytes and seconds of this rank: the first step is not timed, it only counts what autograd keeps."""
    baseline = _resident()
    worker = _started(world, tree, folder)
    engine, traffic, gradients = worker.engine, Traffic(CPU), []
    assert isinstance(engine, ZeroEngine)
    plain = engine.step

    def step() -> float | None:
        gradients.append(_gradient_bytes(engine))
        return plain()

    engine.step = step
    walls, cpus, waits = [], [], []
    with worker.loader(0) as loader:
        activations = _kept(worker, next(loader))
        forget_peak(CPU)
        for number in range(1, steps + 1):
            began, cpu = time.perf_counter(), time.process_time()
            with traffic.counted(kept_collectives()):
                worker.step(next(loader), number)
            walls.append(time.perf_counter() - began)
            cpus.append(time.process_time() - cpu)
            waits.append(traffic.read())
    return {
        "peak": float(peak_bytes(CPU) or 0) - baseline,
        "weights": float(sum(_held(worker.distiller))),
        "gradients": float(max(gradients)),
        "optimizer": float(_optimizer_bytes(engine)),
        "teacher": float(sum(shard_bytes(t.detector) for t in worker.staff.loaded.values())),
        "activations": float(activations),
        "wall": median(walls),
        "cpu": median(cpus),
        "communication": median(waits),
    }


def learnt(world: World, tree: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train the whole schedule of a small recipe: the losses, and AP on the validation images."""
    worker, reports = _started(world, tree, folder), list[StepReport]()
    with worker.loader(0) as loader:
        for number in range(worker.config.optim.steps):
            reports.append(worker.step(next(loader), number))
    worker.replica.load_state_dict(worker.engine.student_state())
    evaluation = worker.config.evaluation
    found = score(worker.replica, worker.val, worker.truth, evaluation, world=world, device=CPU)
    losses = [report.metrics()["loss/total"] for report in reports]
    return {"AP": found.metrics["AP"], "AP50": found.metrics["AP50"], "losses": losses}


def _started(world: World, tree: dict[str, Any], folder: str) -> Worker:
    worker = Worker(Job(tree=tree, folder=folder, run=None), world, CPU)
    worker.start()
    return worker


def _kept(worker: Worker, batches: Sequence[Batch]) -> int:
    """Do the first step; the bytes that autograd kept for its backward, weights left out."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in worker.distiller.parameters()}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        worker.step(batches, 0)
    return sum(kept.values())


def _held(module: nn.Module) -> Iterable[int]:
    """Bytes of every weight that is here between two steps, whole or in part."""
    for parameter in module.parameters():
        shard = getattr(parameter, "ds_tensor", None)
        yield parameter.nbytes if shard is None else parameter.nbytes + shard.nbytes


def _gradient_bytes(engine: ZeroEngine) -> int:
    """After the last backward of a step, before the optimizer."""
    optimizer = engine._engine.optimizer
    found = [p.grad for p in engine.distiller.parameters() if p.grad is not None]
    found += [x for some in getattr(optimizer, "averaged_gradients", {}).values() for x in _tensors(some)]
    found += [p.grad for p in getattr(optimizer, "single_partition_of_fp32_groups", []) if p.grad is not None]
    found += _tensors(getattr(optimizer, "grad_partitions_flat_buffer", None))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for x in value if isinstance(x, Tensor)] if isinstance(value, list | tuple) else []


def _optimizer_bytes(engine: ZeroEngine) -> int:
    """Momenta, and from stage 1 on the copy of the weights that is stepped on."""
    optimizer = engine._engine.optimizer
    copies = [
        *getattr(optimizer, "single_partition_of_fp32_groups", []),
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),
    ]
    remembered = [x for state in engine._base.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in (*copies, *remembered))


def _resident() -> float:
    lines = STATUS.read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
