"""One training run in one process, without Ray, DeepSpeed or recipes: what benchmarks and experiments are made of.

`train` is the whole of it: data, student, teacher (live or cached), step, evaluation. Its parts are the ones that the
cluster uses; only the loop is its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.plain_setup import Setup, build_detector, open_split
from benchmarks.plain_teaching import TEACHER, live_factors, taught
from data_sharding.loader import Loader, evaluation_batches, order_of
from data_sharding.world import World
from kd.clock import Clock
from kd.detectors.base import Detections, Detector
from kd.distiller import Distiller
from kd.engine import PlainEngine
from kd.evaluation import coco
from kd.evaluation.truth import GroundTruth
from kd.optimise import Ema
from kd.step import train_step

Progress = Callable[[int, dict[str, float]], None]


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
