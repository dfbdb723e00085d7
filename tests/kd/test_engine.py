"""The plain engine on one process."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_sharding.world import World
from kd.distiller import Distiller
from kd.engine import PlainEngine
from tests.kd import runs
from tests.kd.runs import ADAMW, SGD, Run, scale_kd


def engine(**changed: Any) -> PlainEngine:
    return PlainEngine(Distiller(runs.detector(0), {}), replace(SGD, **changed))


def test_step_without_a_backward_changes_nothing() -> None:
    plain = engine()
    before = plain.student_state()
    assert plain.step() == 0.0
    assert runs.same(before, plain.student_state())


def test_backward_adds_shares_and_step_takes_their_sum_once() -> None:
    plain = engine()
    weight = plain.distiller.student.get_parameter("fpn.inner_blocks.0.0.weight")
    before = weight.detach().clone()
    for share in (1.0, 2.0):
        plain.backward((weight * share).sum())
    assert plain.step() == pytest.approx(3 * weight.numel() ** 0.5)
    torch.testing.assert_close(weight.detach(), before - 3)
    assert weight.grad is None
    plain.step()
    torch.testing.assert_close(weight.detach(), before - 3)


def test_norm_is_that_before_clipping() -> None:
    plain = engine(clip_norm=0.5)
    weight = plain.distiller.student.get_parameter("fpn.inner_blocks.0.0.weight")
    before = weight.detach().clone()
    plain.backward(weight.sum())
    assert plain.step() == pytest.approx(weight.numel() ** 0.5)
    assert float((weight.detach() - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_forgetting_a_part_leaves_the_others_memory() -> None:
    plain = engine(optimizer="adamw", momentum=0.9)
    plain.backward(torch.stack([p.sum() for p in plain.distiller.parameters()]).sum())
    plain.step()
    backbone = set(plain.distiller.student.backbone.parameters())
    assert backbone < plain.optimizer.state.keys()
    others = len(plain.optimizer.state) - len(backbone)
    plain.forget("backbone")
    assert not backbone & plain.optimizer.state.keys()
    assert len(plain.optimizer.state) == others


def test_student_state_is_cut_off_from_training() -> None:
    plain = engine()
    state = plain.student_state()
    before = copy.deepcopy(state)
    plain.backward(torch.stack([p.sum() for p in plain.distiller.parameters()]).sum())
    plain.step()
    assert runs.same(before, state)
    assert not any(x.requires_grad for x in state.values())
    runs.detector(5).load_state_dict(state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_saved_and_loaded_is_the_run_undisturbed(
    optimizer: Any, accumulate: int, tmp_path: Path
) -> None:
    optim = replace(ADAMW, optimizer=optimizer, accumulate=accumulate, ema=0.9)
    run = Run(distill={"scalekd": scale_kd()}, optim=optim, norm="batch")
    whole = runs.train(World(), run)
    first, second = runs.build(run, World()), runs.build(run, World())
    runs.follow(first, range(3))
    first.engine.save(tmp_path)
    state = copy.deepcopy((first.assistants["scalekd"].state_dict(), first.ema and first.ema.state_dict()))
    runs.follow(first, range(3, 4))  # what happens after the save is lost with the process
    second.engine.load(tmp_path)
    second.assistants["scalekd"].load_state_dict(state[0])
    assert second.ema is not None
    assert state[1] is not None
    second.ema.load_state_dict(state[1])
    rest = runs.follow(second, range(3, 5))
    assert rest.losses == whole.losses[3:]
    assert rest.norms == whole.norms[3:]
    assert runs.same(rest.states[-1], whole.states[-1])
    assert runs.same(rest.average, whole.average)
    assert torch.equal(rest.assistants[-1], whole.assistants[-1])
    assert not runs.same(whole.average, whole.states[-1])


def test_bfloat16_keeps_float32_weights_and_comes_near() -> None:
    run = Run(distill={"scalekd": scale_kd()})
    exact, half = runs.train(World(), run), runs.train(World(), replace(run, precision="bf16"))
    assert runs.near(half, exact)
    assert all(x.dtype == torch.float32 for x in half.states[-1].values())
