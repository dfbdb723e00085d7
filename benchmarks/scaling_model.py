"""A model of a data-parallel step on many GPUs: what each part takes, from constants that are measured or assumed.

Per step and GPU: its own compute; waiting for the slowest of n (independent and normal: mean + sd sqrt(2 ln n)); the
sum of all gradients (a ring inside a node, then between nodes, alpha-beta: Thakur et al. 2005, section 4.2), behind the
backward as DeepSpeed does it at stage 0; and what of the cache's bytes the disks do not bring within the step, as the
loader reads ahead. Evaluation: every GPU its share of the images, then pycocotools on one processor.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds, bytes and images. Which of them are measured, `benchmarks.scaling` says."""

    step_s: float
    """A GPU's own step."""
    spread: float
    """Standard deviation of that from step to step, as a share of it."""
    images_per_gpu: int
    gradient_bytes: float
    node_gpus: int
    inside_bytes_per_s: float
    """Of one GPU to its neighbour in a node."""
    between_bytes_per_s: float
    """Of one node to another."""
    latency_s: float
    """Of one message."""
    cache_bytes_per_image: float
    storage_bytes_per_s: float
    """Of the cache's storage, all readers together."""
    disk_bytes_per_s: float
    """Of a node's own disk, where copies of the cache lie."""
    copied: bool
    """Whether nodes read their own copies, as they do behind a URL once an epoch has passed."""
    val_images: int
    look_s_per_image: float
    score_s_per_image: float
    """COCO's numbers on one processor, of all images."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of n GPUs; seconds of one step, but for the evaluation."""

    gpus: int
    own_s: float
    slowest_s: float
    all_reduce_s: float
    cache_wait_s: float
    cache_gb_per_s: float
    """What all readers ask for together."""
    images_per_s: float
    efficiency: float
    """Images per second and GPU, over those of one GPU."""
    evaluation_s: float

    @property
    def step_s(self) -> float:
        """The whole."""
        return self.own_s + self.slowest_s + self.all_reduce_s + self.cache_wait_s


def ring_s(ranks: int, size: float, bytes_per_s: float, latency_s: float) -> float:
    """A ring's sum of `size` bytes over `ranks`."""
    return 2 * (ranks - 1) * (size / ranks / bytes_per_s + latency_s)


def all_reduce_s(gpus: int, c: Constants) -> float:
    """Inside nodes first, then between them; every GPU of a node carries its part of the second sum."""
    inside = min(gpus, c.node_gpus)
    nodes = math.ceil(gpus / c.node_gpus)
    within = ring_s(inside, c.gradient_bytes, c.inside_bytes_per_s, c.latency_s)
    return within + ring_s(nodes, c.gradient_bytes, c.between_bytes_per_s, c.latency_s)


def predicted(gpus: int, c: Constants) -> Predicted:
    """One row."""
    slowest = c.step_s * c.spread * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0
    summed = all_reduce_s(gpus, c)
    busy = c.step_s + slowest + summed
    needed = gpus * c.images_per_gpu * c.cache_bytes_per_image
    supply = c.disk_bytes_per_s * math.ceil(gpus / c.node_gpus) if c.copied else c.storage_bytes_per_s
    wait = max(0.0, needed / supply - busy)
    step = busy + wait
    speed = gpus * c.images_per_gpu / step
    looked = math.ceil(c.val_images / gpus) * c.look_s_per_image
    return Predicted(
        gpus=gpus,
        own_s=c.step_s,
        slowest_s=slowest,
        all_reduce_s=summed,
        cache_wait_s=wait,
        cache_gb_per_s=needed / step / 1e9,
        images_per_s=speed,
        efficiency=speed / gpus / (c.images_per_gpu / c.step_s),
        evaluation_s=looked + c.val_images * c.score_s_per_image,
    )
