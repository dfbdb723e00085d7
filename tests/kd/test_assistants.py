"""How an assistant learns: its own gradient alone, over micro-batches and ranks, and nothing of the student moves."""

import copy

import pytest
import torch
from torch import Tensor, nn

from data_sharding.batch import Batch
from data_sharding.world import World
from kd.assistants import AssistantTrainer, NonFiniteGradient
from kd.backbones.base import Norm
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.distiller import Distiller, Moment
from kd.methods.base import PyramidAssistant
from kd.step import global_totals
from kd.teacher import LiveTeacher
from tests.kd import runs
from tests.kd.runs import Run, scale_kd

RUN = Run(distill={"scalekd": scale_kd()})


class Line(PyramidAssistant):
    """Adds one learned map; `idle` is never used."""

    def __init__(self, refresh: bool = True) -> None:
        super().__init__()
        self.refresh = refresh
        self.weight, self.idle = nn.Parameter(torch.tensor([2.0, -1.0])), nn.Parameter(torch.ones(3))

    def forward(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(s * self.weight.sum() for s in student)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1, weight_decay=0.5)


def test_step_without_anything_learnt_does_nothing() -> None:
    trainer = AssistantTrainer(Line(), World())
    trainer.step()
    assert torch.equal(trainer.assistant.weight, torch.tensor([2.0, -1.0]))  # pyright: ignore[reportArgumentType]
    assert not trainer.optimizer.state


def test_learning_from_parts_is_one_plain_step_on_their_sum() -> None:
    mine, its = Line(), Line()
    trainer, optimizer = AssistantTrainer(mine, World()), its.optimizer()
    for _ in range(3):
        for factor in (1.0, 3.0):
            trainer.learn(factor * mine.weight.square().sum())
            assert mine.weight.grad is None
        trainer.step()
        its.weight.grad, its.idle.grad = 8 * its.weight.detach(), torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(mine.weight, its.weight)
        torch.testing.assert_close(mine.idle, its.idle)  # a parameter out of use still decays, on every rank alike
        assert mine.weight.grad is None, "memory is given back"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(value: float) -> None:
    trainer = AssistantTrainer(Line(), World())
    trainer.learn((trainer.assistant.get_parameter("weight") * value).sum())
    with pytest.raises(NonFiniteGradient, match="test_assistants") as caught:
        trainer.step()
    assert caught.value.here
    assert torch.equal(trainer.assistant.get_parameter("weight"), torch.tensor([2.0, -1.0]))


def test_state_comes_back_to_the_bit() -> None:
    one, other = AssistantTrainer(Line(), World()), AssistantTrainer(Line(), World())

    def learn(trainer: AssistantTrainer) -> None:
        trainer.learn(trainer.assistant.get_parameter("weight").pow(3).sum())
        trainer.step()

    learn(one)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    learn(one)
    learn(other)
    assert torch.equal(runs.weights({"": one}), runs.weights({"": other}))


@pytest.mark.parametrize(("clip", "expected"), [(None, 1.0), (100.0, 1.0), (0.5, 0.1)])
def test_clipping_scales_the_gradient_of_the_whole_step(clip: float | None, expected: float) -> None:
    """Parts of 3 and 2 make a gradient of length 5, which plain SGD shows."""

    class Clipped(Line):
        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    assistant = Clipped()
    assistant.clip = clip
    trainer = AssistantTrainer(assistant, World())
    for part in (3.0, 2.0):
        trainer.learn(part * assistant.weight[0])
    trainer.step()
    torch.testing.assert_close(assistant.weight.detach(), torch.tensor([2.0 - 5 * expected, -1.0]))


def test_a_schedule_multiplies_the_learning_rate_also_after_a_resume() -> None:
    class Fading(Line):
        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def rate(self, progress: float) -> float:
            return 1 - progress

    def learn(trainer: AssistantTrainer, progress: float) -> None:
        trainer.learn(trainer.assistant.get_parameter("weight").sum())
        trainer.step(progress)

    one, other = AssistantTrainer(Fading(), World()), AssistantTrainer(Fading(), World())
    learn(one, 0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for trainer in (one, other):
        learn(trainer, 0.75)
        expected = torch.tensor([2.0, -1.0]) - 0.1 * (0.5 + 0.25)
        torch.testing.assert_close(trainer.assistant.get_parameter("weight").detach(), expected)


# ---- through the student's head


def prepared(student: Detector, run: Run = RUN) -> tuple[Distiller, LiveTeacher, dict[str, AssistantTrainer], Batch]:
    teacher = runs.live_teacher(student)
    torch.manual_seed(2)
    distiller = Distiller(student, runs.lessons_of(run, student, teacher, World()))
    batch = runs.images_of(0)
    totals = global_totals(distiller, [batch], World())
    return distiller, teacher, runs.assistants_of(run, student, teacher, World()), batch.with_totals(totals)


def test_no_gradient_of_the_assistant_leaks_into_the_student() -> None:
    distiller, teacher, trainers, batch = prepared(runs.detector(0))
    losses = distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=0.0))
    assert not losses["assistant/scalekd"].requires_grad
    assert trainers["scalekd"].optimizer.state, "it learnt and stepped"
    assert all(p.grad is None for p in distiller.parameters()), "and nobody else noticed"
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None for p in trainers["scalekd"].assistant.parameters())


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_advice_is_a_constant_from_after_the_step_or_before_it(refresh: bool, bfloat16: bool) -> None:
    """By hand: outputs of the student's head on the assistant's pyramid, without gradient. autocast keeps the cast
    weights of a whole forward, so the assistant's step inside it must make it forget them."""
    run = Run(distill={"scalekd": scale_kd(refresh=refresh)})
    distiller, teacher, trainers, batch = prepared(runs.detector(0), run)
    assistant = trainers["scalekd"].assistant
    before = copy.deepcopy(assistant)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=0.0))
    (losses["kd/scalekd/cls"] + losses["kd/scalekd/box"]).backward()
    student = runs.detector(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        taps = student.features(student.normalise(batch.images, batch.geometry))
        with torch.no_grad():
            pyramid = (assistant if refresh else before)(taps.pyramid, teacher(batch).pyramid)
            advice = student.predict(pyramid, batch.geometry)
        terms = student.distill_losses(student.predict(taps.pyramid, batch.geometry), advice, batch, "bounded")
    (0.5 * (terms["cls"] + terms["box"])).backward()
    assert torch.equal(losses["kd/scalekd/cls"], 0.5 * terms["cls"])
    assert torch.equal(losses["kd/scalekd/box"], 0.5 * terms["box"])
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert any(name.startswith("head.") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(distiller.student.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_rehearsal_leaves_no_trace_in_the_student(norm: Norm, rehearsal: bool) -> None:
    """It is a second look at the same images: running statistics must move once a step, not twice."""
    distiller, teacher, trainers, batch = prepared(runs.detector(0, norm=norm))
    before = runs.detector(0, norm=norm).state_dict()
    moment = Moment(progress=0.0, rehearsal=rehearsal, single=False)
    losses = distiller(batch, {"big": teacher(batch)}, trainers, moment)
    after = distiller.student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert bool(moved) == (norm == "batch" and not rehearsal)
    assert all("running" in name or "tracked" in name for name in moved)
    assert all(p.grad is None for p in distiller.parameters())
    assert bool(trainers["scalekd"].optimizer.state) == rehearsal, "with accumulation it learns in the rehearsal"
    assert set(losses) == {"assistant/scalekd"} if rehearsal else "task/cls" in losses


def test_an_assistants_pyramid_does_not_move_the_heads_statistics() -> None:
    def statistics(distill: bool) -> list[Tensor]:
        student = runs.detector(0)
        norm = nn.BatchNorm2d(32)
        assert isinstance(student, fcos.FCOS)
        student.head.classification_head.conv[1] = norm
        distiller, teacher, trainers, batch = prepared(student, RUN if distill else Run())
        distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=0.0))
        return [x.clone() for x in norm.buffers()]

    alone, advised = statistics(False), statistics(True)
    assert alone[-1] == len(runs.detector(0).shapes.strides), "the head ran once per level"
    assert all(torch.equal(a, b) for a, b in zip(alone, advised, strict=True))


# ---- the other readings of S4 and S5


def forward(run: Run, progress: float = 0.0) -> tuple[Distiller, dict[str, AssistantTrainer], dict[str, Tensor]]:
    """One forward of a new run, in which the assistant learns."""
    distiller, teacher, trainers, batch = prepared(runs.detector(0), run)
    return distiller, trainers, distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=progress))


@pytest.mark.parametrize("refresh", [True, False])
def test_a_moving_head_gets_the_gradient_of_the_assistants_loss_and_nothing_else_does(refresh: bool) -> None:
    """By hand: the detection loss of the head on the advised pyramid, which is a constant."""
    run = Run(distill={"scalekd": scale_kd(refresh=refresh, moves_head=True)})
    distiller, teacher, trainers, batch = prepared(runs.detector(0), run)
    assistant = trainers["scalekd"].assistant
    before = copy.deepcopy(assistant)
    losses = distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=0.0))
    losses["kd/scalekd/head"].backward()
    moved = {name for name, p in distiller.student.named_parameters() if p.grad is not None}
    student = runs.detector(0)
    assert moved == {name for name, _ in student.named_parameters() if name.startswith("head.")}
    assert all(p.grad is None for p in assistant.parameters())
    with torch.no_grad():
        taps = student.features(student.normalise(batch.images, batch.geometry))
        pyramid = (assistant if refresh else before)(taps.pyramid, teacher(batch).pyramid)
    loss = torch.stack(list(student.task_losses(student.predict(pyramid, batch.geometry), batch).values())).sum()
    loss.backward()
    torch.testing.assert_close(losses["kd/scalekd/head"], loss)
    for name in moved:
        torch.testing.assert_close(distiller.student.get_parameter(name).grad, student.get_parameter(name).grad)


@pytest.mark.parametrize("refresh", [True, False])
def test_moving_the_head_changes_neither_the_assistants_step_nor_its_advice(refresh: bool) -> None:
    (_, mine, moving), (_, its, still) = (
        forward(Run(distill={"scalekd": scale_kd(refresh=refresh, moves_head=moves)})) for moves in (True, False)
    )
    assert torch.equal(runs.weights(mine), runs.weights(its))
    assert moving.keys() - still.keys() == {"kd/scalekd/head"}
    assert all(torch.equal(moving[name], loss) for name, loss in still.items())


def test_the_head_moves_while_the_method_is_off_and_the_assistant_learns() -> None:
    """As in LGD, whose head learns from the assistant's pyramid from the first step on (S7)."""
    _, _, losses = forward(Run(distill={"scalekd": scale_kd(start=0.5, moves_head=True)}))
    assert losses["kd/scalekd/head"].requires_grad
    assert "kd/scalekd/cls" not in losses


def test_an_own_head_belongs_to_the_assistant_alone() -> None:
    distiller, trainers, losses = forward(Run(distill={"scalekd": scale_kd(head="own")}))
    assistant, fresh = trainers["scalekd"].assistant, runs.detector(3)
    own = {name: p for name, p in assistant.named_parameters() if name.startswith("head.")}
    expected = {f"head.{name}": p for name, p in fresh.named_parameters() if name.startswith("head.")}
    assert own.keys() == expected.keys(), "neither backbone nor pyramid"
    assert all(not torch.equal(p, expected[name]) for name, p in own.items()), "and it has stepped"
    assert own.keys() <= assistant.state_dict().keys(), "and is kept in checkpoints"
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None for p in own.values())
    assert distiller.student.get_parameter("head.classification_head.cls_logits.weight").grad is not None


def test_an_own_head_gives_the_advice() -> None:
    run = Run(distill={"scalekd": scale_kd(head="own")})
    distiller, teacher, trainers, batch = prepared(runs.detector(0), run)
    losses = distiller(batch, {"big": teacher(batch)}, trainers, Moment(progress=0.0))
    student, assistant = runs.detector(0), trainers["scalekd"].assistant
    with torch.no_grad():
        taps = student.features(student.normalise(batch.images, batch.geometry))
        assert isinstance(assistant, PyramidAssistant)
        own = assistant.predictor(student)
        assert own is not student
        advice = own.predict(assistant(taps.pyramid, teacher(batch).pyramid), batch.geometry)
        terms = student.distill_losses(student.predict(taps.pyramid, batch.geometry), advice, batch, "bounded")
    assert torch.equal(losses["kd/scalekd/cls"], 0.5 * terms["cls"])
