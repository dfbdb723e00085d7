"""The sections of a recipe that belong to no plug-in: teachers, order, evaluation, resources."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_sharding.remote import Remote
from kd.slicing import SliceConfig

CodecName = Literal[
    "fp16", "fp32", "int8", "int8_channel", "int8_position", "sparse", "sparse_channel", "sparse_position"
]
TapName = Literal["c5", "p2", "p3", "p4", "p5", "p6", "p7"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One frozen teacher: which, at which resolution, and what must be true before it may teach."""

    name: str = "teacher"
    weights: Path
    """The `student` folder that a training run ends with (student.safetensors, and student.json with the detector's
    settings), or a file: a checkpoint of torchvision's FCOS, RetinaNet or Faster R-CNN with a ResNet, such as
    fcos_resnet50_fpn_coco-99b0c9b7.pth. Which of these it is is read off the file."""
    classes: dict[str, str | int] = field(default_factory=dict)
    """What the teacher calls a class of the data set: `{car: automobile}`, or `{car: 3}` by the number of its output,
    where nobody wrote names down. Classes that are not in here keep their name. Of a teacher that knows more classes,
    or in another order, the named ones are taken; with a folder that needs at least one entry here."""
    factor: Literal[1, 2] = 2
    """The teacher sees the student's canvas this many times as large."""
    align: Literal["shift", "pool"] = "shift"
    """How a 2x teacher's pyramid comes to the student's grid: level l+1 at level l, or pooled."""
    weight: float = 1.0
    """Multiplies all that is learnt from this teacher."""
    inherit: tuple[Literal["neck", "head"], ...] = ()
    """Parts of the student that begin as this teacher's, which must have the same shapes there."""
    cache: bool = True
    """Read the taps from the cache on disk; false: run the teacher in every step."""
    codec: CodecName = "fp16"
    """How the cache stores the taps: fp16 or fp32 numbers; int8, half of fp16; or sparse, int8 of the positions inside
    slightly enlarged boxes alone, a few percent, for methods that read no others. `..._channel` and `..._position` say
    what has a scale of its own; without: the one that errs less on this teacher, measured before anything is stored."""
    tap_codecs: dict[TapName, CodecName] = field(default_factory=dict)
    """Taps that are stored in another way: `{c5: fp16}`."""
    stores: tuple[Literal["c5", "pyramid"], ...] = ()
    """Taps that the cache holds beside those that the methods read, so that runs of other methods share it."""
    shard: bool = False
    """A live teacher too large for one device: every worker keeps a part of its backbone and pyramid (ZeRO-3), and
    gathers layer by layer. Refused for now: the workers' gathers do not meet."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The teacher's own forward, live and for the cache."""
    min_ap: float = 0.0
    """The gate: AP in 0..100 on the first `gate_images` validation images, at the teacher's resolution."""
    gate_images: int = 500

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight must be >= 0, got {self.weight}")
        if not 0 <= self.min_ap <= 100:
            raise ValueError(f"min_ap is an AP in 0..100, got {self.min_ap}")
        if self.gate_images < 1:
            raise ValueError(f"gate_images must be >= 1, got {self.gate_images}")


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """In which order an epoch goes through the shards. It does not depend on the number of workers."""

    window: int = 16
    """Shards whose samples are shuffled together: more is closer to a uniform shuffle, and more files open at once."""
    lanes: int = 1
    """Equal parts of an epoch that are read side by side; divides `optim.batch`. With a multiple of the nodes, each
    node reads its own part of the shards in an epoch instead of all."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.lanes < 1:
            raise ValueError(f"window and lanes must be >= 1, got {self.window} and {self.lanes}")


@dataclass(frozen=True, kw_only=True)
class EvaluationViews:
    """The one plain rendering of every image that is evaluated: no crop, no flip, no jitter."""

    short_side: int | None = 800
    """Pixels of the resized image's short side; null: its own size."""
    long_side: int = 1333
    """Cap on the long side."""
    buckets: tuple[tuple[int, int], ...]
    """Canvases (H, W) in pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how the validation split is evaluated."""

    every: int = 0
    """Steps between evaluations; 0: at the end only."""
    batch: int = 16
    """Images per forward and worker."""
    max_dets: tuple[int, ...] = (1, 10, 100)
    """Detections per image that AR is told for; AP uses the last."""
    areas: tuple[int, ...] = (8, 16, 32)
    """Edges in pixels of the finer size classes: (0, 8], (8, 16], (16, 32], beside COCO's own."""
    protocols: tuple[Literal["visdrone", "voc"], ...] = ()
    """Data sets' own numbers beside COCO's: VisDrone's toolkit's (visdrone_AP, visdrone_AR500, ...) and VOC's (voc_AP,
    voc_AP_2007, both at IoU 0.5)."""
    views: EvaluationViews | None = None
    """null: the training views without crop, flip and jitter, at their largest short side."""
    slices: SliceConfig | None = None
    """Look at overlapping tiles, each rendered as an image of its own, and join what they show; null: at each image
    once. Scores are of whole images either way."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.batch < 1:
            raise ValueError(f"every must be >= 0 and batch >= 1, got {self.every} and {self.batch}")
        for name in ("max_dets", "areas"):
            edges = getattr(self, name)
            if not edges or edges[0] < 1 or list(edges) != sorted(set(edges)):
                raise ValueError(f"{name} must be growing numbers >= 1, got {list(edges)}")


def _require_pieces(until: int | None, gpu_share: float) -> None:
    if until is not None and until < 1:
        raise ValueError(f"until must be >= 1, or null, got {until}")
    if not 0 < gpu_share <= 1:
        raise ValueError(f"gpu_share must be in (0, 1], got {gpu_share}")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What the run uses of the cluster. Apart from `precision`, nothing here changes what is learnt."""

    workers: int | tuple[int, int] = 1
    """Processes that train together, one per GPU where there are any. `[least, most]`: a run begins with as many as
    there is room for, goes on with fewer where a node is lost, and takes in more at a checkpoint after one has joined;
    batches and their order stay what they are."""
    gpu: bool | None = None
    """Whether a worker takes a GPU; null: when the cluster has enough."""
    gpu_share: float = 1.0
    """Share of a GPU that a worker takes, where it takes one: at 0.25 four small runs of one worker share a GPU."""
    threads: int = 1
    """CPU cores per worker."""
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage."""
    offload: bool = False
    """Keep the optimizer's share (weights, momenta, gradients) in the host's memory and step there; needs `zero`."""
    activation_checkpointing: bool = False
    """Compute the backbone's blocks again in the backward instead of keeping what they made: less memory, about a
    third more time, the same bits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The student's forward; weights and optimizer stay float32."""
    prefetch: int = 2
    """Steps that the loader is ahead."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    begin: Path | None = None
    """The folder of a checkpoint to begin from instead of step 0: one of a run that learnt the same up to there, such
    as the common steps before a method's gate. What the run itself has saved goes before."""
    until: int | None = None
    """The step after which the run rests, with a checkpoint but without a result; null: it runs to its end."""
    max_failures: int = 3
    """Restarts after lost workers before the run gives up; a node that is taken away with a notice does not count."""
    notice_every: int = 10
    """Steps between two looks whether a node is about to be taken away; a checkpoint is written then."""
    hang_after: float = 600.0
    """Seconds without a movement of any worker until the ones that hold up the others are named and all are restarted.
    The longest that a healthy run stands still is rank 0's sum of an evaluation, or a compiler's first step."""
    wait_for_room: float = 3600.0
    """Seconds that a checkpoint waits for room on a full disk before the run stops; the same command continues it."""
    checksums: Literal["first", "always", "never"] = "first"
    """When a worker verifies what it reads of a teacher cache: each sample's first time, every time, never."""
    caches: str | None = None
    """Where teacher caches are: a folder that all machines share, or a URL (s3://bucket/caches, file:///slow/folder)
    whose shards each machine copies before it needs them. Keys and endpoints are the environment's. null: below
    `storage`."""
    staging: Path | None = None
    """The folder on each machine's own disk for copies of caches behind a URL; null: among its temporary files."""
    staging_gb: float = 50.0
    """What the copies of all workers of a machine may take, in 10^9 bytes; the least recently used make room."""
    staging_ahead: int = 4
    """Shards that each worker has copied before their first use."""

    def __post_init__(self) -> None:
        for name in ("threads", "prefetch", "checkpoint_every", "keep", "notice_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.least_workers < 1 or self.least_workers > self.most_workers:
            raise ValueError(
                f"workers must be a number >= 1, or [least, most] of them with 1 <= least <= most, got {self.workers}"
            )
        for name in ("hang_after", "wait_for_room"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is a number of seconds > 0, got {getattr(self, name)}")
        _require_pieces(self.until, self.gpu_share)
        if self.max_failures < 0:
            raise ValueError(f"max_failures must be >= 0, got {self.max_failures}")
        if self.staging_gb <= 0 or self.staging_ahead < 0:
            raise ValueError(
                f"staging_gb must be > 0 and staging_ahead >= 0, got {self.staging_gb} and {self.staging_ahead}"
            )
        if self.caches is not None and "://" in self.caches:
            Remote(self.caches)  # refuses one that holds a secret

    @property
    def least_workers(self) -> int:
        """With as many a run can go on."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """It never has more."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]
