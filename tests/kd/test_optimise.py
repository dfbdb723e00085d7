"""Schedules at points worked out by hand, groups, rates, clipping, the average."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_sharding.world import World
from kd.backbones.base import Norm
from kd.distiller import Distiller
from kd.optimise import Ema, OptimConfig, build_optimizer, clip_gradients, parameter_groups, set_rates
from tests.kd import runs
from tests.kd.runs import Run, scale_kd

STEP = OptimConfig(lr=0.01, steps=90_000, warmup=500)
COSINE = OptimConfig(lr=0.02, steps=100, warmup=0, schedule="flat_cosine", flat=0.5, final=0.1)


def distiller(norm: Norm = "group") -> Distiller:
    student = runs.detector(0, norm=norm)
    run = Run(distill={"scalekd": scale_kd()})
    return Distiller(student, runs.lessons_of(run, student, runs.live_teacher(student), World()))


# ---- schedules


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.01 * 1e-3),
        (250, 0.01 * (1e-3 + 0.999 / 2)),
        (500, 0.01),
        (59_999, 0.01),
        (60_000, 0.001),
        (79_999, 0.001),
        (80_000, 0.0001),
        (89_999, 0.0001),
    ],
)
def test_step_schedule_is_the_papers(step: int, rate: float) -> None:
    assert STEP.learning_rate(step) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.02), (49, 0.02), (50, 0.02), (75, 0.02 * 0.55), (100, 0.02 * 0.1)],
)
def test_flat_cosine_is_flat_and_then_falls_to_its_end(step: int, rate: float) -> None:
    assert COSINE.learning_rate(step) == pytest.approx(rate, rel=1e-9)


def test_flat_cosine_without_a_flat_part_is_a_cosine() -> None:
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert replace(COSINE, flat=0.0).learning_rate(25) == pytest.approx(0.02 * quarter)
    assert replace(COSINE, flat=1.0).learning_rate(99) == 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0}, {"steps": 0}, {"batch": 0}, {"accumulate": 0}, {"weight_decay": -1.0}, {"warmup": -1},
        {"momentum": 1.0}, {"milestones": (0.9, 0.5)}, {"milestones": (1.0,)}, {"flat": 1.5}, {"clip_norm": 0.0},
        {"ema": 1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)


# ---- groups


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_groups_hold_every_trainable_parameter_exactly_once(norm: Norm) -> None:
    whole = distiller(norm)
    grouped = [id(p) for group in parameter_groups(whole, STEP) for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in whole.parameters() if p.requires_grad})
    assert any(not p.requires_grad for p in whole.parameters()), "the teacher's side of ScaleKD is frozen"


def test_groups_part_backbone_detector_and_methods_and_do_not_decay_normalisers_and_biases() -> None:
    whole = distiller()
    names = {id(p): name for name, p in whole.named_parameters()}
    groups = parameter_groups(whole, replace(STEP, weight_decay=0.3))
    assert [g["name"] for g in groups] == [
        "backbone", "backbone/bare", "detector", "detector/bare", "methods", "methods/bare"
    ]  # fmt: skip
    for group in groups:
        part, bare = group["name"].split("/")[0], group["name"].endswith("/bare")
        prefixes = {"backbone": "student.backbone.", "methods": "methods.", "detector": "student."}
        found = [names[id(p)] for p in group["params"]]
        assert all(name.startswith(prefixes[part]) for name in found)
        assert (part == "detector") <= all("backbone" not in name for name in found)
        assert all((p.ndim == 1) == bare for p in group["params"]), "here exactly norms and biases are vectors"
        assert group["weight_decay"] == (0.0 if bare else 0.3)


def test_student_groups_are_the_same_with_and_without_methods() -> None:
    taught, alone = distiller(), Distiller(runs.detector(0), {})
    mine = [(g["name"], [p.shape for p in g["params"]]) for g in parameter_groups(alone, STEP)]
    both = [(g["name"], [p.shape for p in g["params"]]) for g in parameter_groups(taught, STEP)]
    assert both[: len(mine)] == mine


def test_rates_by_part_and_none_for_a_frozen_backbone() -> None:
    config = replace(STEP, warmup=0, backbone_lr=0.1, weight_decay=0.3)
    groups = parameter_groups(distiller(), config)
    assert set_rates(groups, config, 0, frozen=False) == {"backbone": 0.001, "detector": 0.01, "methods": 0.01}
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0] * 3
    rates = set_rates(groups, config, 60_000, frozen=True)
    assert rates == {"backbone": 0.0, "detector": pytest.approx(0.001), "methods": pytest.approx(0.001)}
    assert [g["weight_decay"] for g in groups] == [0.0, 0.0, 0.3, 0.0, 0.3, 0.0]
    assert [g["lr"] for g in groups[:2]] == [0.0, 0.0]
    set_rates(groups, config, 60_001, frozen=False)
    assert groups[0]["weight_decay"] == 0.3, "the decay comes back when the gate opens"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_take_momentum_and_rates_from_the_settings(name: Any) -> None:
    config = replace(STEP, optimizer=name, momentum=0.8)
    optimizer = build_optimizer(parameter_groups(distiller(), config), config)
    kind, key, value = {
        "sgd": (torch.optim.SGD, "momentum", 0.8), "adamw": (torch.optim.AdamW, "betas", (0.8, 0.999))
    }[name]  # fmt: skip
    assert type(optimizer) is kind
    assert all(group[key] == value for group in optimizer.param_groups)


# ---- clipping


def with_gradients(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize("scale", [0.01, 10.0])
@pytest.mark.parametrize("limit", [1.0, None])
def test_clipping_is_torchs(scale: float, limit: float | None) -> None:
    mine, its = with_gradients(scale), with_gradients(scale)
    groups = [{"params": mine[:2]}, {"params": mine[2:]}]
    norm = clip_gradients(groups, limit)
    assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(its, limit or math.inf)), rel=1e-6)
    torch.testing.assert_close(gradients(mine), gradients(its), rtol=1e-6, atol=0)


def test_clipping_without_any_gradient_is_nothing() -> None:
    assert clip_gradients([{"params": [nn.Parameter(torch.zeros(3))]}], 1.0) == 0.0
    assert clip_gradients([], 1.0) == 0.0


@pytest.mark.parametrize("idle", [None, torch.zeros(7)])
def test_a_group_without_gradient_leaves_the_others_clipping_bit_equal(idle: Tensor | None) -> None:
    alone, beside, other = with_gradients(10.0), with_gradients(10.0), nn.Parameter(torch.zeros(7))
    other.grad = idle
    norms = clip_gradients([{"params": alone}], 0.5), clip_gradients([{"params": beside}, {"params": [other]}], 0.5)
    assert norms[0] == norms[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients(alone), gradients(beside), strict=True))


# ---- the average


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("count", torch.tensor(0))


def test_average_by_hand() -> None:
    student = Small()
    ema = Ema(student, decay=0.5)
    student.weight.data.add_(10)
    student.count += 3  # pyright: ignore[reportOperatorIssue]
    ema.update(student, step=0)  # the decay grows in: 1 / 10
    torch.testing.assert_close(ema.state_dict()["weight"], torch.tensor([10.0, 11.0]))
    ema.update(student, step=1000)  # and stays at 0.5
    torch.testing.assert_close(ema.state_dict()["weight"], torch.tensor([10.5, 11.5]))
    assert ema.state_dict()["count"] == 3
    assert torch.equal(student.weight, torch.tensor([11.0, 12.0])), "averaging never touches the student"


def test_average_comes_back_from_its_state_and_refuses_another_students() -> None:
    student = Small()
    ema, other = Ema(student, 0.5), Ema(student, 0.5)
    student.weight.data.add_(1)
    ema.update(student, 5)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    assert runs.same(ema.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="another student"):
        ema.load_state_dict({"weight": torch.zeros(2)})


def test_average_of_shards_is_refused() -> None:
    student = Small()
    ema = Ema(student, 0.5)
    student.weight.data = torch.zeros(0)  # what ZeRO 3 leaves on a rank
    with pytest.raises(ValueError, match=r"weight.*optim\.ema"):
        ema.update(student, 0)
