"""The training step on one process: totals, sums, gates, accumulation, the check before the optimizer, the report."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from data_sharding.batch import Batch
from data_sharding.world import World
from kd.backbones.base import Norm
from kd.distiller import Distiller, Lesson
from kd.methods import cwd, fitnet, pkd, scalekd
from kd.methods.base import MethodConfig
from kd.step import NonFiniteLoss, StepReport, global_totals
from tests.kd import runs
from tests.kd.detecting import DETECTORS
from tests.kd.runs import ADAMW, SGD, Run, scale_kd

METHODS: dict[str, Mapping[str, MethodConfig]] = {
    "nothing": {},
    "scalekd": {"scalekd": scale_kd()},
    "scalekd without refresh": {"scalekd": scale_kd(refresh=False)},
    "fitnet": {"fitnet": fitnet.Config()},
    "cwd": {"cwd": cwd.Config()},
    "pkd by image": {"pkd": pkd.Config(statistics="image")},
    "two methods": {"scalekd": scale_kd(), "fitnet": fitnet.Config()},
}

# ---- totals


def test_totals_of_images_without_boxes() -> None:
    batch = runs.part_of(runs.images_of(0), slice(1, 2))
    assert not len(batch.boxes[0])
    totals = global_totals(Distiller(runs.detector(0), {}), [batch], World())
    assert {name: value.item() for name, value in totals.items()} == {"images": 1.0, "boxes": 0.0, "positives": 0.0}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_totals_span_all_micro_batches(accumulate: int) -> None:
    distiller = Distiller(runs.detector(0), {})
    totals = global_totals(distiller, runs.micro_batches(0, World(), accumulate), World())
    assert totals["images"] == 4
    assert totals["boxes"] == sum(len(boxes) for boxes in runs.images_of(0).boxes) == 10
    assert totals["positives"] == distiller.student.counts(runs.images_of(0))["positives"] > 10


# ---- the sum


@pytest.mark.parametrize(
    ("detector", "name"),
    [("fcos", name) for name in METHODS] + [(kind, "scalekd") for kind in DETECTORS if kind != "fcos"],
)
def test_accumulated_gradient_is_the_whole_batchs(detector: str, name: str) -> None:
    """SGD with rate 1 subtracts the gradient. Equal but for the rounding of sums in another order."""
    run = Run(detector=detector, distill=METHODS[name], optim=SGD, steps=1)
    whole = runs.train(World(), run)
    for accumulate in (2, 4):
        parts = runs.train(World(), replace(run, optim=replace(SGD, accumulate=accumulate)))
        assert runs.gap(whole, parts) < 1e-5
        gradient = runs.change(whole)
        assert (runs.change(parts) - gradient).norm() < 1e-4 * gradient.norm()
        assert runs.assistants_agree(parts, whole)


def test_pkds_whole_batch_statistics_refuse_accumulation() -> None:
    run = Run(distill={"pkd": pkd.Config()}, optim=replace(SGD, accumulate=2))
    with pytest.raises(ValueError, match="accumulate"):
        runs.build(run, World())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_scalekd_without_weights_is_no_scalekd_to_the_bit(detector: str, accumulate: int, norm: Norm) -> None:
    run = Run(detector=detector, optim=replace(ADAMW, accumulate=accumulate), norm=norm)
    plain = runs.train(World(), run)
    idle = runs.train(World(), replace(run, distill={"scalekd": scale_kd(weight=0.0)}))
    assert all(runs.same(a, b) for a, b in zip(plain.states, idle.states, strict=True))
    assert not torch.equal(idle.assistants[0], idle.assistants[-1])
    assert not runs.same(plain.states[0], plain.states[-1])


def test_the_students_weights_follow_the_methods_weights() -> None:
    plain, taught = runs.train(World(), Run()), runs.train(World(), Run(distill={"scalekd": scale_kd()}))
    assert runs.same(plain.states[0], taught.states[0])
    assert not runs.same(plain.states[1], taught.states[1])


# ---- gates


def test_a_gated_method_waits_while_its_assistant_learns() -> None:
    gated = replace(scale_kd(freeze=0.25), start=0.5)
    run = Run(distill={"scalekd": gated}, optim=replace(ADAMW, steps=4), steps=4)
    outcome = runs.train(World(), run)
    assert ["kd/scalekd/cls" in losses for losses in outcome.losses] == [False, False, True, True]
    assert all("assistant/scalekd" in losses for losses in outcome.losses)
    moved = [not torch.equal(a, b) for a, b in zip(outcome.assistants, outcome.assistants[1:], strict=False)]
    assert moved == [True] * 4
    backbone = [runs.change(replace(outcome, states=[a, b]), "backbone").abs().max() > 0
                for a, b in zip(outcome.states, outcome.states[1:], strict=False)]  # fmt: skip
    assert backbone == [False, True, True, True]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_assistant_that_is_gated_waits_with_its_method(accumulate: int) -> None:
    config = scale_kd()
    gated = replace(config, start=0.5, csa=replace(config.csa, start="gated"))
    optim = replace(ADAMW, steps=4, accumulate=accumulate)
    outcome = runs.train(World(), Run(distill={"scalekd": gated}, optim=optim, steps=4))
    moved = [not torch.equal(a, b) for a, b in zip(outcome.assistants, outcome.assistants[1:], strict=False)]
    assert moved == [False, False, True, True]
    assert ["assistant/scalekd" in losses for losses in outcome.losses] == moved


def test_strength_is_the_teachers_weight_times_the_gate() -> None:
    config = scalekd.Config(weight=2.0, start=0.25, ramp=0.5, stop=0.9)
    lesson = Lesson(name="big/scalekd", teacher="big", config=config, weight=0.5)
    assert [lesson.strength(p) for p in (0.0, 0.25, 0.5, 0.75, 0.89, 0.9)] == [0.0, 0.0, 0.5, 1.0, 1.0, 0.0]


def test_ramp_scales_the_logged_terms() -> None:
    config = replace(scale_kd(), ramp=0.5)
    optim = replace(ADAMW, steps=4, lr=1e-12)  # the student all but stands still
    ramped = runs.train(World(), Run(distill={"scalekd": config}, optim=optim, steps=2))
    full = runs.train(World(), Run(distill={"scalekd": scale_kd()}, optim=optim, steps=2))
    assert "kd/scalekd/feat" not in ramped.losses[0], "of strength 0: not computed"
    assert ramped.losses[1]["kd/scalekd/feat"] == pytest.approx(full.losses[1]["kd/scalekd/feat"] / 2, rel=1e-5)


# ---- the check


def poisoned(run: Run) -> tuple[runs.Parts, Batch]:
    """A run whose student standardises pixels with a mean that is not a number, from its second step on."""
    parts = runs.build(run, World())
    parts.do(0)
    parts.engine.distiller.student.mean.fill_(float("nan"))
    return parts, runs.images_of(1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(name: str, accumulate: int) -> None:
    parts, batch = poisoned(Run(distill=METHODS[name], optim=replace(ADAMW, accumulate=accumulate)))
    before, advisers = parts.engine.student_state(), runs.weights(parts.assistants)
    with pytest.raises(NonFiniteLoss) as caught:
        parts.do(1)
    message = str(caught.value)
    assert message.startswith("step 1: ")
    assert str(list(batch.image_ids)) in message
    assert ("scalekd" if "scalekd" in METHODS[name] else "task/cls") in message
    assert runs.same(before, parts.engine.student_state())
    assert torch.equal(advisers, runs.weights(parts.assistants))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_gradient_that_is_not_finite_though_the_loss_is_stops_before_the_optimizer(
    value: float, clip_norm: float | None
) -> None:
    parts = runs.build(Run(optim=replace(ADAMW, clip_norm=clip_norm)), World())
    parts.do(0)
    before = parts.engine.student_state()
    next(parts.engine.distiller.student.parameters()).register_hook(lambda gradient: gradient * value)
    with pytest.raises(NonFiniteLoss, match=r"step 1: the gradient's norm is (nan|inf)"):
        parts.do(1)
    assert runs.same(before, parts.engine.student_state())


# ---- the report


def test_metrics_by_hand() -> None:
    report = StepReport(
        losses={"task/cls": 1.0, "task/box": 3.0, "kd/fitnet/feat": 2.0, "assistant/scalekd": 9.0},
        rates={"backbone": 0.1},
        norm=5.0,
    )
    assert report.metrics() == {
        "loss/task/cls": 1.0, "loss/task/box": 3.0, "loss/kd/fitnet/feat": 2.0, "loss/assistant/scalekd": 9.0,
        "loss/total": 6.0, "share/fitnet/feat": 0.5, "lr/backbone": 0.1, "train/gradient_norm": 5.0,
    }  # fmt: skip


def test_metrics_without_task_loss_or_norm() -> None:
    metrics = StepReport(losses={"task/cls": 0.0, "kd/fitnet/feat": 2.0}, rates={}, norm=None).metrics()
    assert metrics == {"loss/task/cls": 0.0, "loss/kd/fitnet/feat": 2.0, "loss/total": 2.0}


def test_a_step_reports_losses_rates_and_norm_and_a_boxless_batch_is_fine() -> None:
    parts = runs.build(Run(distill={"scalekd": scale_kd()}), World())
    report = parts.do(0)
    assert set(report.losses) == {
        "task/cls", "task/box", "task/centerness", "kd/scalekd/feat", "kd/scalekd/cls", "kd/scalekd/box",
        "assistant/scalekd",
    }  # fmt: skip
    assert report.rates == {"backbone": 1e-3, "detector": 1e-3, "methods": 1e-3}
    assert report.norm is not None
    assert report.norm > 0.5


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_step_without_any_box(detector: str, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runs.images_of(0)
    empty = replace(whole, boxes=(torch.zeros(0, 4),) * 4, labels=(torch.zeros(0, dtype=torch.int64),) * 4)
    monkeypatch.setattr(runs, "images_of", lambda step: empty)
    optim = replace(ADAMW, accumulate=accumulate)
    outcome = runs.train(World(), Run(detector=detector, distill={"scalekd": scale_kd()}, optim=optim, steps=2))
    for losses in outcome.losses:
        assert losses["task/box"] == losses["kd/scalekd/box"] == 0
        assert losses.get("task/centerness", 0) == losses.get("task/rpn_box", 0) == 0
        assert losses["task/cls"] > 0
        assert losses["kd/scalekd/feat"] > 0
