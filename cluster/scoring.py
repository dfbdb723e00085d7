"""Evaluate a detector on the validation split, each rank its share, the same numbers on every rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.build import Split
from cluster.sections import EvaluationConfig
from data_sharding.loader import evaluation_batches
from data_sharding.world import World
from kd.detectors.base import Detections, Detector
from kd.evaluation import coco
from kd.evaluation.coco import GroundTruth


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation found."""

    metrics: dict[str, float]
    """AP and its relatives in 0..100; AR too."""
    detections: dict[int, Detections]
    """By image id, in pixels of the original image, on the CPU; on rank 0 alone."""


def ground_truth(split: Split, first: int | None = None) -> GroundTruth:
    """The labels of a split, without decoding an image."""
    dataset = split.dataset
    truth = GroundTruth.from_records((dataset.record(i) for i in range(len(dataset))), dataset.categories)
    return truth if first is None else truth.subset(sorted(truth.image_ids)[:first])


@torch.no_grad()
def score(
    detector: Detector,
    split: Split,
    truth: GroundTruth,
    config: EvaluationConfig,
    *,
    world: World,
    device: torch.device,
    factor: int = 1,
    first: int | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Run `detector`, in eval mode, over the split at `factor` times the student's resolution."""
    found: dict[int, Detections] = {}
    total = min(len(split.dataset), first or len(split.dataset))
    batches = evaluation_batches(
        split.dataset, split.views, world=world, batch=config.batch, factor=factor, threads=threads, first=first
    )
    sizes = dict(
        zip(
            split.dataset.image_ids.tolist(),
            zip(split.dataset.heights.tolist(), split.dataset.widths.tolist(), strict=True),
            strict=True,
        )
    )
    for batch in batches:
        moved = batch.to(device)
        taps = detector.features(detector.normalise(moved.images, moved.geometry))
        outputs = detector.predict(taps.pyramid, moved.geometry)
        valid = batch.geometry.sizes.tolist()
        for image, size, detections in zip(
            batch.image_ids, valid, detector.detect(outputs, moved.geometry), strict=True
        ):
            if image >= 0:
                there = coco.to_original(detections, (size[0], size[1]), sizes[image])
                found[image] = Detections(there.boxes.cpu(), there.scores.cpu(), there.labels.cpu())
        if progress is not None:
            progress(min(len(found) * world.size, total), total)
    merged = coco.merge(part for part in world.gather(found) if isinstance(part, dict))
    metrics: object = None
    if world.rank == 0:
        coco.check_complete(merged, truth.image_ids)
        raw = coco.evaluate(truth, merged, max_dets=config.max_dets, sizes=coco.size_classes(config.areas))
        metrics = {name: value if value < 0 else 100 * value for name, value in raw.items()}
    shared = world.gather(metrics)[0]
    assert isinstance(shared, dict)
    return Score(metrics=shared, detections=merged if world.rank == 0 else {})
