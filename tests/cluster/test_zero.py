"""Promises that need two ranks: DeepSpeed at every stage, the plain engine, and one rank alone are the same training.

All cases run inside one pair of processes (`two_ranks`). "To the bit" holds for one engine; engines and rank counts
among themselves agree up to the rounding of sums in another order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cluster.recovery import checkpoints
from cluster.zero import ZeroEngine
from data_sharding.batch import Batch, Taps
from data_sharding.world import World
from kd.backbones.base import evaluating
from kd.distiller import Moment
from kd.engine import Engine
from kd.methods import cwd, fitnet, hkd, pkd
from kd.methods.base import MethodConfig
from kd.step import NonFiniteLoss, global_totals, train_step
from tests.cluster.two_ranks import ranks
from tests.kd import runs
from tests.kd.detecting import DETECTORS
from tests.kd.runs import ADAMW, KINDS, SGD, Kind, Outcome, Run, scale_kd

pytestmark = pytest.mark.cluster

Both = Callable[[Run], tuple[Outcome, Outcome]]


@pytest.fixture(scope="module")
def both() -> Both:
    """Train on two ranks; each run once, however many tests look at it."""
    found: dict[str, tuple[Outcome, Outcome]] = {}

    def train(run: Run) -> tuple[Outcome, Outcome]:
        if repr(run) not in found:
            found[repr(run)] = tuple(ranks()(runs.train, run))
        return found[repr(run)]

    return train


# ---- two ranks are one


METHODS: dict[str, Mapping[str, MethodConfig]] = {
    "nothing": {},
    "scalekd": {"scalekd": scale_kd()},
    "scalekd without refresh": {"scalekd": scale_kd(refresh=False)},
    "scalekd that moves the head": {"scalekd": scale_kd(moves_head=True)},
    "scalekd with an own head": {"scalekd": scale_kd(head="own")},
    "fitnet": {"fitnet": fitnet.Config()},
    "cwd": {"cwd": cwd.Config()},
    "pkd": {"pkd": pkd.Config()},
    "pkd by image": {"pkd": pkd.Config(statistics="image")},
}
METHODS |= {name: {name: config} for name, config in runs.every_method().items() if name not in METHODS}
METHODS["hkd by share"] = {"hkd": hkd.Config(scale="none")}
WHOLE_STEPS = ("pkd", "hkd")
"""Their statistics are of whole steps: they refuse to accumulate, and have a setting without (above)."""
KINKED = {"clsd": 1e-2}
"""It samples pixels at the student's boxes: the gradient jumps from pixel to pixel, and rounding may cross an edge."""


@pytest.mark.parametrize(
    ("detector", "name"),
    [("fcos", name) for name in METHODS] + [(kind, "scalekd") for kind in DETECTORS if kind != "fcos"],
)
def test_gradient_of_two_ranks_is_that_of_one(detector: str, name: str, both: Both) -> None:
    """SGD with rate 1 subtracts the gradient of the global batch of four images, two of which hold most boxes."""
    run = Run(detector=detector, distill=METHODS[name], optim=SGD, steps=1)
    one = runs.train(World(), run)
    accumulated = [] if name in WHOLE_STEPS else [replace(run, optim=replace(SGD, accumulate=2))]
    for shared in (run, *accumulated):
        first, second = both(shared)
        assert runs.gap(first, one) < 1e-5
        assert close(runs.change(first), runs.change(one), KINKED.get(name, 1e-4))
        assert runs.assistants_agree(first, one)
        assert first.losses == second.losses
        assert runs.same(first.states[-1], second.states[-1])
        assert torch.equal(first.assistants[-1], second.assistants[-1])


@pytest.mark.parametrize("kind", [2, 3])
def test_gradient_with_a_real_backbone(kind: Kind, both: Both) -> None:
    run = Run(distill=METHODS["scalekd"], optim=SGD, steps=1, real=True)
    assert close(runs.change(both(replace(run, kind=kind))[0]), runs.change(runs.train(World(), run)))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_gradient_of_every_detector_at_every_stage(kind: Kind, detector: str, both: Both) -> None:
    run = Run(detector=detector, distill=METHODS["scalekd"], optim=SGD, steps=1)
    assert close(runs.change(both(replace(run, kind=kind))[0]), runs.change(runs.train(World(), run)))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("kind", [0, 3])
def test_a_rank_without_any_box_waits_for_nobody(kind: Kind, detector: str) -> None:
    """Every rank calls the same modules equally often, whatever its images hold."""
    for outcome in ranks()(train_on_half, Run(kind=kind, detector=detector, distill=METHODS["scalekd"], steps=2)):
        assert all(math.isfinite(value) for losses in outcome.losses for value in losses.values())


def train_on_half(world: World, run: Run) -> Outcome:
    """Train with boxes on rank 0 alone; on a rank."""
    given = runs.images_of

    def half(step: int) -> Batch:
        whole = given(step)
        boxes = tuple(x if i < runs.IMAGES // 2 else x[:0] for i, x in enumerate(whole.boxes))
        labels = tuple(x if i < runs.IMAGES // 2 else x[:0] for i, x in enumerate(whole.labels))
        return replace(whole, boxes=boxes, labels=labels)

    with patch.object(runs, "images_of", half):
        return runs.train(world, run)


def close(gradient: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((gradient - other).norm() < tolerance * other.norm())


# ---- the engines are one


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_scalekd_without_weights_is_no_scalekd_to_the_bit(kind: Kind, accumulate: int, both: Both) -> None:
    optim = replace(ADAMW, accumulate=accumulate)
    plain, _ = both(Run(kind=kind, optim=optim))
    idle, other = both(Run(kind=kind, optim=optim, distill={"scalekd": scale_kd(weight=0.0)}))
    assert len(plain.states) == 6
    assert not runs.same(plain.states[0], plain.states[1])
    assert all(runs.same(a, b) for a, b in zip(plain.states, idle.states, strict=True))
    assert plain.norms == idle.norms
    assert min(norm for norm in plain.norms if norm is not None) > 0.5, "the clipping was at work"
    assert all(not torch.equal(a, b) for a, b in zip(idle.assistants, idle.assistants[1:], strict=False))
    assert torch.equal(idle.assistants[-1], other.assistants[-1])


def test_more_than_two_ranks_do_not_let_idle_methods_into_the_students_bits() -> None:
    """Two numbers have one sum; three have several, by their place in the buffer that travels around the ring."""
    for kind in ("plain", 0):
        plain = Run(kind=kind, steps=2)
        idle = replace(plain, distill={"scalekd": scale_kd(weight=0.0)})
        found = [ranks(3)(runs.train, run)[0].states for run in (plain, idle)]
        assert all(runs.same(a, b) for a, b in zip(*found, strict=True))


Interrupted = Callable[[Kind, int], tuple[Outcome, Outcome]]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A run of five steps that saves after three, and the last two steps of another that loads; rank 0's."""
    found: dict[tuple[Kind, int], tuple[Outcome, Outcome]] = {}

    def train(kind: Kind, accumulate: int) -> tuple[Outcome, Outcome]:
        if (kind, accumulate) not in found:
            folder = tmp_path_factory.mktemp("checkpoint")
            optim = replace(ADAMW, accumulate=accumulate, ema=None if kind == 3 else 0.9)
            run = Run(kind=kind, optim=optim, distill={"scalekd": scale_kd()})
            found[kind, accumulate] = ranks()(save_and_load, run, folder)[0]
        return found[kind, accumulate]

    return train


def save_and_load(world: World, run: Run, folder: Path) -> tuple[Outcome, Outcome]:
    """See `interrupted`; on a rank."""
    first, second = runs.build(run, world), runs.build(run, world)

    def rest(parts: runs.Parts) -> dict[str, Any]:
        return {"engine": parts.engine, "assistants": parts.assistants, "ema": parts.ema, "world": world, "facts": {}}

    def save(done: int) -> None:
        if done == 3:
            checkpoints.save(folder, step=done, **rest(first))

    whole = runs.follow(first, range(5), after=save)
    world.barrier()
    done, _ = checkpoints.load(folder, **rest(second))
    return whole, runs.follow(second, range(done, 5))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_goes_the_plain_engines_way(kind: Kind, accumulate: int, interrupted: Interrupted) -> None:
    mine, plain = interrupted(kind, accumulate)[0], interrupted("plain", accumulate)[0]
    assert runs.gap(mine, plain) < 1e-5
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(mine.norms, plain.norms, strict=True))
    assert torch.equal(mine.assistants[1], plain.assistants[1])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_saved_and_loaded_is_the_run_undisturbed(
    kind: Kind, accumulate: int, interrupted: Interrupted
) -> None:
    whole, rest = interrupted(kind, accumulate)
    assert len(rest.losses) == 2
    assert runs.same(rest.states[0], whole.states[3])
    assert rest.losses == whole.losses[3:]
    assert rest.norms == whole.norms[3:]
    assert runs.same(rest.states[-1], whole.states[-1])
    assert torch.equal(rest.assistants[-1], whole.assistants[-1])
    assert runs.same(rest.average, whole.average)
    assert bool(whole.average) == (kind != 3)


@pytest.mark.parametrize("name", ["scalekd that moves the head", "scalekd with an own head"])
@pytest.mark.parametrize("kind", [0, 2, 3])
def test_every_stage_reads_s4_and_s5_alike(kind: Kind, name: str, both: Both) -> None:
    run = Run(kind=kind, distill=METHODS[name], optim=ADAMW, steps=2)
    (mine, other), (plain, _) = both(run), both(replace(run, kind="plain"))
    assert runs.gap(mine, plain) < 1e-5
    assert torch.equal(mine.assistants[-1], other.assistants[-1]), "equal on every rank"
    assert torch.equal(mine.assistants[1], plain.assistants[1])


# ---- a frozen backbone


def frozen_run(kind: Kind, optimizer: Literal["sgd", "adamw"]) -> Run:
    """Frozen for two of four steps, with decay and memory that would move it, and BatchNorm that would drift."""
    optim = replace(ADAMW, optimizer=optimizer, lr=1e-3, weight_decay=0.1, momentum=0.9, steps=4, milestones=())
    return Run(kind=kind, norm="batch", distill={"scalekd": scale_kd(freeze=0.5)}, optim=optim, steps=4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_backbone_is_unchanged_and_then_moves(
    kind: Kind, optimizer: Literal["sgd", "adamw"], both: Both
) -> None:
    outcome, _ = both(frozen_run(kind, optimizer))
    backbone = [{n: x for n, x in state.items() if n.startswith("backbone.")} for state in outcome.states]
    assert any("running_var" in name for name in backbone[0])
    assert runs.same(backbone[0], backbone[1])
    assert runs.same(backbone[0], backbone[2])
    moved = {name for name in backbone[0] if not torch.equal(backbone[2][name], backbone[3][name])}
    assert moved == set(backbone[0]), "weights and running statistics"
    assert not runs.same(outcome.states[0], outcome.states[1]), "the rest learnt meanwhile"


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_after_the_gate_is_a_first_step_of_adam(kind: Kind, both: Both) -> None:
    """Adam's first step is rate x sign(gradient), its third after two of zero gradient would be less than half."""
    run = frozen_run(kind, "adamw")
    outcome, _ = both(run)
    before, after = outcome.states[2], outcome.states[3]
    names = [name for name in before if name.startswith("backbone.") and before[name].ndim == 4]
    steps = torch.cat([(before[n] * (1 - run.optim.lr * 0.1) - after[n]).flatten().abs() for n in names])
    assert float(steps.median()) == pytest.approx(run.optim.lr, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_clip_norm_leaves_the_frozen_backbone_out(kind: Kind, both: Both) -> None:
    rest, whole = norms_by_hand(replace(frozen_run(kind, "adamw"), kind="plain"))
    assert whole > 1.001 * rest, "otherwise this test sees nothing"
    assert both(frozen_run(kind, "adamw"))[0].norms[0] == pytest.approx(rest, rel=1e-4)


def norms_by_hand(run: Run) -> tuple[float, float]:
    """Gradient norms of the first step on one rank, without engine, without and with the backbone's part."""
    parts = runs.build(run, World())
    distiller, batch = parts.engine.distiller, runs.images_of(0)
    batch = batch.with_totals(global_totals(distiller, [batch], World()))
    taught = {name: teacher(batch) for name, teacher in parts.teachers.items()}
    with evaluating(distiller.student.backbone):
        losses = distiller(batch, taught, parts.assistants, Moment(progress=0.5))
    torch.stack([loss for name, loss in losses.items() if not name.startswith("assistant/")]).sum().backward()
    squares = {n: float(p.grad.double().square().sum()) for n, p in distiller.named_parameters() if p.grad is not None}
    rest = sum(square for name, square in squares.items() if not name.startswith("student.backbone."))
    return math.sqrt(rest), math.sqrt(sum(squares.values()))


# ---- the check before the optimizer


def stop(world: World, run: Run, poison: str) -> dict[str, Any]:
    """Do a good step, then one in which rank 1 meets numbers that are none; what happened, on a rank."""
    parts = runs.build(run, world)
    parts.do(0)
    before = _weights(parts.engine)
    teachers = dict(parts.teachers)
    if world.rank == 1 and poison == "pixels":
        parts.engine.distiller.student.mean.fill_(float("nan"))
    if world.rank == 1 and poison == "teacher":
        teachers = {name: _overflowing(teacher) for name, teacher in teachers.items()}
    batches = runs.micro_batches(1, world, run.optim.accumulate)
    message = ""
    try:
        train_step(parts.engine, batches, teachers, parts.assistants, run.optim, 1, world, parts.clock)
    except NonFiniteLoss as error:
        message = str(error)
    return {"message": message, "same": torch.equal(before, _weights(parts.engine))}


def _weights(engine: Engine) -> Tensor:
    """All that the optimizer owns on this rank: at stage 3, a forward that was broken off cannot be gathered from, and
    the shards' unused ends hold whatever lay in memory, also no numbers."""
    owned = [s for s, _ in engine._shards()] if isinstance(engine, ZeroEngine) else engine.distiller.parameters()
    return torch.cat([x.detach().flatten() for x in owned]).nan_to_num()


def _overflowing(teacher: Callable[[Batch], Taps]) -> Callable[[Batch], Taps]:
    def see(batch: Batch) -> Taps:
        taps = teacher(batch)
        return Taps(None if taps.c5 is None else taps.c5 * float("inf"), taps.pyramid)

    return see


@pytest.mark.parametrize(
    ("name", "accumulate", "poison", "term"),
    [("nothing", 1, "pixels", "task/cls"), ("scalekd", 1, "pixels", "kd.methods.scalekd"),
     ("scalekd", 2, "pixels", "kd.methods.scalekd"), ("scalekd", 2, "teacher", "kd/scalekd/feat")],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_optimizer(
    kind: Kind, name: str, accumulate: int, poison: str, term: str
) -> None:
    run = Run(kind=kind, optim=replace(ADAMW, accumulate=accumulate), distill=METHODS[name])
    answers = ranks()(stop, run, poison)
    for answer in answers:
        assert answer["message"].startswith("step 1: ")
        assert term in answer["message"]
        assert str(list(runs.images_of(1).image_ids[2:])) in answer["message"], "rank 1's images, on both ranks"
        assert answer["same"]
    assert answers[0]["message"] == answers[1]["message"]


def break_gradient(world: World, run: Run) -> str:
    """Do a step in which rank 1's gradient is not finite though every loss is; what is told, on a rank."""
    parts = runs.build(run, world)
    if world.rank == 1:
        parts.engine.distiller.student.get_parameter("fpn.layer_blocks.0.0.weight").register_hook(
            lambda g: g * math.nan
        )
    try:
        parts.do(0)
    except NonFiniteLoss as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_a_checkpoint(kind: Kind) -> None:
    """At stages 1 to 3 DeepSpeed has stepped by then; what counts is that such weights are never saved."""
    told = ranks()(break_gradient, Run(kind=kind))
    assert told[0] == told[1]
    assert told[0].startswith("step 0: the gradient's norm is ")


# ---- bfloat16


@pytest.mark.parametrize("kind", ["plain", 0, 2, 3])
def test_bfloat16_is_finite_and_comes_near(kind: Kind, both: Both) -> None:
    run = Run(kind=kind, distill={"scalekd": scale_kd()}, optim=ADAMW)
    exact, half = both(replace(run, kind="plain"))[0], both(replace(run, precision="bf16"))[0]
    assert runs.near(half, exact)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in half.states[-1].values())
