"""What a finished run leaves in its folder: the student alone, its detections, pictures and numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import pictures
from cluster.build import Split
from cluster.config import RunConfig, evaluation_views
from cluster.metric_log import MetricLog
from cluster.scoring import Score, looks_per_image
from cluster.tracking import RunHandle
from data_sharding.files import write_atomically
from kd import student as student_files
from kd.detectors.base import Detector
from kd.evaluation.coco import to_coco_results
from kd.evaluation.speed import measure

METRICS = "metrics.jsonl"
STUDENT = "student"
RESULT = "result.json"
DETECTIONS = "detections.json"
RESTED = "rested"
"""The key under which a run that rests before its end returns the step."""
CHECKPOINT = "checkpoint"
"""Then: the folder of the checkpoint that it left."""
STOPPED = "stopped"
"""The key under which a worker returns why the run cannot go on."""


def leave(
    folder: Path,
    config: RunConfig,
    student: Detector,
    val: Split,
    found: Score,
    handle: RunHandle | None,
    log: MetricLog | None,
    step: int,
) -> dict[str, Any]:
    """Write it all below `folder` and keep copies beside the MLflow run; the run's numbers. For rank 0."""
    categories = val.dataset.categories
    student_files.save(
        student, config.student, categories, folder / STUDENT, input=_input_of(config), metrics=found.metrics
    )
    detections = json.dumps(to_coco_results(found.detections, categories)).encode()
    write_atomically(folder / DETECTIONS, detections)
    picture = pictures.beside_truth(val.dataset, {"student": found.detections}, folder / "samples.png")
    if handle is not None:
        for path in (picture, folder / STUDENT, folder / DETECTIONS):
            handle.add_file(path)
    speed = measure(student, val.views.view(0, 0).canvas)
    milliseconds = speed.milliseconds * looks_per_image(val, config.evaluation.slices)
    facts = {"parameters": speed.parameters, "ms_per_image": milliseconds, "gflops": speed.gflops}
    if log is not None:
        log.log(step, {f"student/{name}": float(value) for name, value in facts.items()})
    return {"metrics": found.metrics, **facts}


def read(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run; None while it is not finished."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def _input_of(config: RunConfig) -> dict[str, Any]:
    views, slices = evaluation_views(config), config.evaluation.slices
    return {
        "short_side": None if views.short_side is None else list(views.short_side),
        "long_side": views.long_side,
        "buckets": [list(b) for b in views.buckets],
        "slices": None if slices is None else asdict(slices),
    }
