"""Evaluate a detector on the validation split, each rank its share, the same numbers on every rank."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from cluster.build import Split
from cluster.sections import EvaluationConfig
from data_sharding.images import decode
from data_sharding.loader import evaluation_batches
from data_sharding.world import World
from kd.deploy import Predictor, network
from kd.detectors.base import Detections, Detector
from kd.evaluation import coco, visdrone, voc
from kd.evaluation.truth import GroundTruth
from kd.slicing import SliceConfig, sliced, tiles_of


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


def looks_per_image(split: Split, slices: SliceConfig | None) -> float:
    """How many canvases a detector sees per image: 1, or tiles and the whole image."""
    sizes = zip(split.dataset.heights.tolist(), split.dataset.widths.tolist(), strict=True)
    return 1.0 if slices is None else statistics.mean(len(tiles_of(height, width, slices)) for height, width in sizes)


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
    looked = _look_sliced if config.slices is not None else _look
    found: dict[int, Detections] = {}
    total = min(len(split.dataset), first or len(split.dataset))
    share = Share(split=split, world=world, device=device, factor=factor, first=first, threads=threads)
    for images in looked(detector, share, config):
        found |= images
        if progress is not None:
            progress(min(len(found) * world.size, total), total)
    merged = coco.merge(part for part in world.gather(found) if isinstance(part, dict))
    metrics: object = None
    if world.rank == 0:
        coco.check_complete(merged, truth.image_ids)
        metrics = {k: v if v < 0 else 100 * v for k, v in _numbers(truth, merged, config).items()}
    shared = world.gather(metrics)[0]
    assert isinstance(shared, dict)
    return Score(metrics=shared, detections=merged if world.rank == 0 else {})


def _numbers(truth: GroundTruth, found: dict[int, Detections], config: EvaluationConfig) -> dict[str, float]:
    """COCO's numbers, and those of the data set's own evaluation under its name."""
    numbers = coco.evaluate(truth, found, max_dets=config.max_dets, sizes=coco.size_classes(config.areas))
    own = {"visdrone": visdrone.evaluate, "voc": voc.evaluate}
    for protocol in config.protocols:
        numbers |= {f"{protocol}_{name}": value for name, value in own[protocol](truth, found).items()}
    return numbers


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank looks at, and how."""

    split: Split
    world: World
    device: torch.device
    factor: int
    first: int | None
    threads: int


def _look(detector: Detector, share: Share, config: EvaluationConfig) -> Iterator[dict[int, Detections]]:
    """Every image once, in batches: image id -> detections in its own pixels."""
    dataset = share.split.dataset
    heights_widths = zip(dataset.heights.tolist(), dataset.widths.tolist(), strict=True)
    sizes = dict(zip(dataset.image_ids.tolist(), heights_widths, strict=True))
    batches = evaluation_batches(
        dataset,
        share.split.views,
        world=share.world,
        batch=config.batch,
        factor=share.factor,
        threads=share.threads,
        first=share.first,
    )
    for batch in batches:
        moved = batch.to(share.device)
        looked = detector.detect(network(detector, moved.images, moved.geometry), moved.geometry)
        found: dict[int, Detections] = {}
        for image, size, detections in zip(batch.image_ids, batch.geometry.sizes.tolist(), looked, strict=True):
            if image >= 0:
                there = coco.to_original(detections, (size[0], size[1]), sizes[image])
                found[image] = Detections(there.boxes.cpu(), there.scores.cpu(), there.labels.cpu())
        yield found


def _look_sliced(detector: Detector, share: Share, config: EvaluationConfig) -> Iterator[dict[int, Detections]]:
    """The same, tile by tile."""
    assert config.slices is not None
    dataset = share.split.dataset
    predictor = Predictor(detector, share.split.views.config, batch=config.batch, factor=share.factor)
    wanted = sorted(range(len(dataset)), key=lambda i: int(dataset.image_ids[i]))[: share.first]
    for position in wanted[share.world.rank :: share.world.size]:
        record = dataset.record(position)
        image = decode(record.image, record.file_name)
        yield {record.image_id: sliced(image, predictor, config.slices)}
