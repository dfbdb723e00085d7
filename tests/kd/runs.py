"""Whole training runs in miniature: a real student, a live teacher of its kind at twice the resolution, real methods.

Everything is a function of the settings and the world, so that runs of different engines and rank counts compare.
The backbone has five convolutions, because DeepSpeed's time goes with the number of modules; one test takes a real one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Geometry
from data_sharding.order import rank_slice
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.backbones import mobilenetv2
from kd.backbones.base import Backbone, Norm, norm_layer
from kd.clock import Clock
from kd.detectors.base import Detector
from kd.distiller import Distiller, Lesson
from kd.engine import Engine, PlainEngine, Precision
from kd.methods import scalekd
from kd.methods.base import Method, MethodConfig, Pair
from kd.optimise import Ema, OptimConfig
from kd.plugins import plugin, plugins
from kd.step import StepReport, train_step
from kd.teacher import LiveTeacher, Teacher, TeacherHead
from tests.kd import fake

CANVAS, CLASSES, IMAGES = 64, 3, 4
KINDS = ("plain", 0, 1, 2, 3)
Kind = Literal["plain", 0, 1, 2, 3]
SGD = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, steps=10, batch=IMAGES, warmup=0)
"""One step of it subtracts the gradient from the weights."""
ADAMW = OptimConfig(optimizer="adamw", lr=1e-3, weight_decay=0.01, steps=10, batch=IMAGES, warmup=0, clip_norm=0.5)


def scale_kd(
    *, weight: float = 0.5, refresh: bool = True, freeze: float = 0.0, start: float = 0.0,
    head: Literal["shared", "own"] = "shared", moves_head: bool = False,
) -> scalekd.Config:  # fmt: skip
    """ScaleKD with all three terms at `weight`, from the first step on."""
    return scalekd.Config(
        start=start,
        freeze=freeze,
        alpha=weight,
        beta=weight,
        gamma=weight,
        sdf=scalekd.Sdf(width=8, token_width=4),
        csa=scalekd.Csa(heads=2, refresh=refresh, zero_init=False, head=head, moves_head=moves_head),
    )


def every_method() -> dict[str, MethodConfig]:
    """Every method in the folder with its own settings, on from the first step to the last."""
    always: dict[str, Any] = {"start": 0.0, "ramp": 0.0, "stop": 1.0, "freeze": 0.0}
    own: dict[str, Any] = {
        "clsd": {"weights": fake.classifier(), "classifier": fake.CLASSIFIER, "crop": 32},
        "scalekd": {"csa": scalekd.Csa(heads=2)},  # of the narrow taps of these tests
        "icd": {"decoder": fake.DECODER},
        "hmkd": {"decoder": fake.DECODER, "inquiry": fake.INQUIRY},
    }
    return {n: replace(module.Config(), **always, **own.get(n, {})) for n, module in plugins("kd.methods").items()}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What to train, and with what."""

    kind: Kind = "plain"
    detector: str = "fcos"
    """The plug-in of student and teacher."""
    distill: Mapping[str, MethodConfig] = field(default_factory=dict)
    optim: OptimConfig = ADAMW
    norm: Norm = "group"
    real: bool = False
    """MobileNetV2 instead of five convolutions."""
    precision: Precision = "fp32"
    steps: int = 5
    offload: bool = False
    recompute: bool = False
    shard: bool = False
    """Whether the ranks share the teacher's weights out."""

    @property
    def head(self) -> dict[str, Any]:
        """Settings of both heads that a method cannot be without."""
        return {"bins": 8} if "ld" in self.distill and self.detector != "faster_rcnn" else {}


@dataclass(frozen=True, kw_only=True)
class Seeing:
    """How `big` sees."""

    factor: int = 2
    align: Literal["shift"] = "shift"
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The live objects of a run on one rank."""

    engine: Engine
    teachers: Mapping[str, Teacher]
    assistants: Mapping[str, AssistantTrainer]
    ema: Ema | None
    clock: Clock
    do: Callable[[int], StepReport]
    """Do one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves on one rank; `states[i]` and `assistants[i]` are those after i steps."""

    losses: list[dict[str, float]]
    norms: list[float | None]
    states: list[dict[str, Tensor]]
    assistants: list[Tensor]
    average: dict[str, Tensor]


class FiveConvolutions(Backbone):
    """Strides 2, 4, 8, 16, 32, nothing else."""

    channels = (8, 12, 16, 24)

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        widths, make = (3, 8, *self.channels), norm_layer(norm)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), make(o), nn.ReLU()) for i, o in pairwise(widths)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = [images]
        for stage in self.stages:
            found.append(self.through((stage,), found[-1]))
        return found[2], found[3], found[4], found[5]


SMALL: dict[str, dict[str, Any]] = {
    "retinanet": {"anchor_sizes": (2.0, 3.0)},
    "faster_rcnn": {"roi_width": 32, "roi_samples": 16, "anchor_samples": 64, "proposals": 50, "anchor_sizes": (3.0,)},
}
"""What a plug-in's settings are beyond those that all have."""


def detector(
    seed: int,
    width: int = 32,
    norm: Norm = "group",
    real: bool = False,
    name: str = "fcos",
    levels: tuple[int, ...] = (3, 4, 5),
    **changes: Any,
) -> Detector:
    """A tiny detector with random weights, the same for the same arguments."""
    module = plugin("kd.detectors", name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = mobilenetv2.Config(width_mult=0.25, norm=norm)
        settings = {"backbone": backbone, "width": width, "head_depth": 1, "levels": levels} | SMALL.get(name, {})
        config = module.Config(**settings | changes)
        whole = module.build(config, CLASSES)
        if real:
            return whole
        torch.manual_seed(seed)
        return type(whole)(config, CLASSES, FiveConvolutions(norm))


def live_teacher(student: Detector, name: str = "fcos", **changes: Any) -> LiveTeacher:
    """A teacher of another width that sees twice the student's resolution."""
    reads = frozenset({"c5", "pyramid"})
    return LiveTeacher(detector(1, width=16, name=name, **changes), student.shapes, factor=2, rule="shift", reads=reads)


def images_of(step: int) -> Batch:
    """The whole global batch of a step: images with many, few and no boxes, each time in another order."""
    generator = torch.Generator().manual_seed(100 + step)
    counts = [(3, 0, 1, 6)[(i + step) % IMAGES] for i in range(IMAGES)]

    def pixels(side: int) -> Tensor:
        return torch.randint(0, 256, (IMAGES, 3, side, side), generator=generator, dtype=torch.uint8)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=generator) * 36
        return torch.cat([corner, corner + 3 + torch.rand(count, 2, generator=generator) * 24], dim=1)

    ids = tuple(range(10 * step, 10 * step + IMAGES))
    return Batch(
        images=pixels(CANVAS),
        geometry=Geometry((CANVAS, CANVAS), torch.tensor([[64, 64], [64, 48], [40, 64], [64, 64]])),
        boxes=tuple(boxes(count) for count in counts),
        labels=tuple(torch.randint(0, CLASSES, (count,), generator=generator) for count in counts),
        ignore=(torch.tensor([[0.0, 0.0, 20.0, 20.0]]),) + (torch.zeros(0, 4),) * (IMAGES - 1),
        image_ids=ids,
        views=(0,) * IMAGES,
        scaled_images={2: pixels(2 * CANVAS)},
    )


def part_of(batch: Batch, which: slice) -> Batch:
    """Some of the images of a batch."""
    return Batch(
        images=batch.images[which],
        geometry=Geometry(batch.geometry.canvas, batch.geometry.sizes[which]),
        boxes=batch.boxes[which],
        labels=batch.labels[which],
        ignore=batch.ignore[which],
        image_ids=batch.image_ids[which],
        views=batch.views[which],
        scaled_images={factor: x[which] for factor, x in batch.scaled_images.items()},
    )


def micro_batches(step: int, world: World, accumulate: int) -> list[Batch]:
    """This rank's part of the global batch, shared as the loader does."""
    mine = part_of(images_of(step), rank_slice(IMAGES, world))
    return [part_of(mine, rank_slice(len(mine), World(rank=i, size=accumulate))) for i in range(accumulate)]


def lessons_of(run: Run, student: Detector, shapes: LiveTeacher, world: World) -> dict[str, tuple[Lesson, Method]]:
    """The run's methods, those that want a teacher learning from `big`, whose head is there for those that ask it."""
    pair = Pair(student=student.shapes, teacher=shapes.shapes, world=world, accumulate=run.optim.accumulate)
    lessons: dict[str, tuple[Lesson, Method]] = {}
    for name, config in run.distill.items():
        method = plugin("kd.methods", name).Loss(config, pair)
        head = (
            TeacherHead(shapes.detector, student.shapes, Seeing(), torch.device("cpu")) if method.needs_head else None
        )
        teacher = "big" if config.taught else None
        lessons[name] = (Lesson(name=name, teacher=teacher, config=config, head=head), method)
    return lessons


def assistants_of(run: Run, student: Detector, shapes: LiveTeacher, world: World) -> dict[str, AssistantTrainer]:
    """The assistants of the run's methods, also where nobody listens to them."""
    pair = Pair(
        student=student.shapes, teacher=shapes.shapes, world=world, accumulate=run.optim.accumulate,
        detector=lambda: detector(3, norm=run.norm),
    )  # fmt: skip
    modules = {name: plugin("kd.methods", name) for name in run.distill}
    return {
        name: AssistantTrainer(module.Assistant(run.distill[name], pair), world)
        for name, module in modules.items()
        if hasattr(module, "Assistant")
    }


def build(run: Run, world: World) -> Parts:
    """All objects of a run on this rank, with the same first weights on every rank and for every engine."""
    student = detector(0, norm=run.norm, real=run.real, name=run.detector, **run.head)
    student.backbone.recompute = run.recompute
    teacher = live_teacher(student, run.detector, **run.head)
    if run.shard:
        from cluster.sharded_teacher import share_out
        from cluster.zero import start_deepspeed

        start_deepspeed()
        features = share_out(teacher.detector, torch.device("cpu"), whole_below=0)
        teacher = LiveTeacher(
            teacher.detector, student.shapes, factor=2, rule="shift", reads=frozenset({"c5", "pyramid"}),
            features=features, images=-(-IMAGES // (world.size * run.optim.accumulate)),
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        lessons = lessons_of(run, student, teacher, world)
        assistants = assistants_of(run, student, teacher, world)
    ema = None if run.optim.ema is None else Ema(student, run.optim.ema)
    engine = _engine(run, Distiller(student, lessons), world)
    teachers: dict[str, Teacher] = {"big": teacher} if run.distill else {}
    clock = Clock()

    def do(step: int) -> StepReport:
        batches = micro_batches(step, world, run.optim.accumulate)
        report = train_step(engine, batches, teachers, assistants, run.optim, step, world, clock)
        if ema is not None:
            ema.update(student, step)
        return report

    return Parts(engine=engine, teachers=teachers, assistants=assistants, ema=ema, clock=clock, do=do)


def _engine(run: Run, distiller: Distiller, world: World) -> Engine:
    if run.kind == "plain":
        return PlainEngine(distiller, run.optim, world, run.precision)
    from cluster.zero import ZeroEngine, start_deepspeed

    start_deepspeed()
    return ZeroEngine(distiller, run.optim, world, stage=run.kind, precision=run.precision, offload=run.offload)


def train(world: World, run: Run) -> Outcome:
    """Do the run's steps from the beginning."""
    return follow(build(run, world), range(run.steps))


def follow(parts: Parts, steps: range, after: Callable[[int], None] = lambda step: None) -> Outcome:
    """Do some steps; `after` is called with the number of steps done."""
    reports: list[StepReport] = []
    states, assistants = [parts.engine.student_state()], [weights(parts.assistants)]
    for step in steps:
        reports.append(parts.do(step))
        states.append(parts.engine.student_state())
        assistants.append(weights(parts.assistants))
        after(step + 1)
    return Outcome(
        losses=[report.losses for report in reports],
        norms=[report.norm for report in reports],
        states=states,
        assistants=assistants,
        average={} if parts.ema is None else {n: x.clone() for n, x in parts.ema.state_dict().items()},
    )


def weights(assistants: Mapping[str, AssistantTrainer]) -> Tensor:
    """All weights of all assistants in one flat tensor."""
    flat = [p.detach().flatten() for trainer in assistants.values() for p in trainer.assistant.parameters()]
    return torch.cat(flat) if flat else torch.zeros(0)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def change(outcome: Outcome, part: str = "") -> Tensor:
    """What the run did to the student's weights whose name begins with `part`, as one flat tensor."""
    first, last = outcome.states[0], outcome.states[-1]
    return torch.cat([(first[n] - last[n]).flatten() for n in first if n.startswith(part)])


def assistants_agree(a: Outcome, b: Outcome) -> bool:
    """Whether the assistants learnt the same, but for the few weights with next to no gradient, of which Adam makes a
    whole step in the direction of rounding."""
    mine, its = a.assistants[-1] - a.assistants[0], b.assistants[-1] - b.assistants[0]
    return not len(its) or bool((mine - its).norm() < 1e-2 * its.norm())


def gap(a: Outcome, b: Outcome) -> float:
    """The largest difference of the losses of two runs, relative to the larger (to 0.1 where both are smaller: a
    divergence of nearly equal outputs is a difference of large sums)."""
    return max(max(gaps.values()) for gaps in _gaps(a, b))


def near(rough: Outcome, exact: Outcome) -> bool:
    """Whether a run in bfloat16 goes the way of the one in float32, but is not it. The bounded box loss counts a box
    or not, as the student is or is not worse than its advice; rounding decides where they are nearly tied, so
    it is compared loosely and in the first step alone."""
    gaps = _gaps(rough, exact)
    boxes = [gap for name, gap in gaps[0].items() if name.endswith("/scalekd/box")]
    others = [gap for step in gaps for name, gap in step.items() if not name.endswith("/scalekd/box")]
    return 0 < max(others) < 0.03 and max(boxes, default=0) < 0.1


def _gaps(a: Outcome, b: Outcome) -> list[dict[str, float]]:
    def relative(x: float, y: float) -> float:
        return abs(x - y) / max(abs(x), abs(y), 0.1)

    return [{name: relative(x[name], y[name]) for name in x | y} for x, y in zip(a.losses, b.losses, strict=True)]
