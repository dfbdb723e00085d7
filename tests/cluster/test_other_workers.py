"""A run goes on with another number of workers: the same global batches, so the same losses to rounding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.fragments import Fragment, Stored, save
from cluster.grammar import ConfigError
from cluster.recovery import checkpoints
from data_sharding.world import World
from tests.cluster.two_ranks import Ranks, ranks
from tests.kd import runs
from tests.kd.runs import ADAMW, SGD, Kind, Outcome, Run, scale_kd

pytestmark = pytest.mark.cluster

STEPS = 5
STRETCHES = ((0, 2, 2), (2, 3, 3), (3, 4, 1), (4, 5, 2))
"""(first step, end, workers); four images are not shared evenly by three."""


def stretch(world: World, run: Run, read: Path | None, write: Path | None, end: int) -> Outcome:
    """Build the run anew, load, go on until `end`, save; on a rank."""
    parts = runs.build(run, world)
    rest = {"engine": parts.engine, "assistants": parts.assistants, "ema": parts.ema, "world": world, "facts": {}}
    done = 0 if read is None else checkpoints.load(read, **rest)[0]
    outcome = runs.follow(parts, range(done, end))
    if write is not None:
        checkpoints.save(write, step=end, **rest)
        world.barrier()
    return outcome


@pytest.fixture(scope="module")
def groups() -> dict[int, Ranks]:
    """Processes that stay alive, by their number."""
    return {number: ranks(number) for number in (1, 2, 3)}


@pytest.mark.parametrize(
    ("kind", "run"),
    [(kind, Run(optim=ADAMW, distill={"scalekd": scale_kd()})) for kind in (0, 3)]
    + [(1, Run(optim=replace(SGD, lr=0.02, momentum=0.9, ema=0.9)))]
    + [(2, Run(optim=replace(ADAMW, optimizer="sgd", momentum=0.9), distill={"scalekd": scale_kd(freeze=0.3)}))],
)
def test_losses_are_those_of_the_undisturbed_run(
    kind: Kind, run: Run, groups: dict[int, Ranks], tmp_path: Path
) -> None:
    run = replace(run, kind=kind)
    undisturbed = groups[2](stretch, run, None, None, STEPS)[0]
    read, part = None, undisturbed
    for first, end, workers in STRETCHES:
        write = tmp_path / str(end)
        part = groups[workers](stretch, run, read, write, end)[0]
        expected = replace(undisturbed, losses=undisturbed.losses[first:end])
        assert len(part.losses) == end - first
        assert runs.gap(part, expected) < 2e-5, (first, workers)
        assert json.loads((write / "minnow.json").read_text())["workers"] == workers
        read = write
    last = torch.cat([x.flatten() for x in part.states[-1].values()])
    its = torch.cat([x.flatten() for x in undisturbed.states[-1].values()])
    assert float((last - its).norm() / its.norm()) < 1e-5
    if run.optim.ema is not None:
        assert all(torch.allclose(x, undisturbed.average[n], rtol=1e-4, atol=1e-5) for n, x in part.average.items())


def test_uneven_ranks_take_the_gradient_of_the_whole_batch(groups: dict[int, Ranks]) -> None:
    run = Run(optim=SGD, distill={"scalekd": scale_kd()}, steps=1)
    one = runs.change(runs.train(World(), run))
    for kind in (0, 2, 3):
        found = runs.change(groups[3](runs.train, replace(run, kind=kind))[0])
        assert (found - one).norm() < 1e-4 * one.norm(), kind


def test_another_stage_of_zero_is_refused(groups: dict[int, Ranks], tmp_path: Path) -> None:
    (told,) = groups[1](refused, tmp_path)
    assert "zero: checkpoint 2, now 0" in told


def refused(world: World, folder: Path) -> str:
    """Save at one stage, load at another; what is told, on a rank."""
    run = Run(kind=0)
    parts = runs.build(run, world)
    rest = {"engine": parts.engine, "assistants": parts.assistants, "ema": parts.ema, "world": world}
    checkpoints.save(folder, step=1, facts={"zero": 2}, **rest)
    try:
        checkpoints.load(folder, facts={"zero": 0}, **rest)
    except ConfigError as error:
        return str(error)
    return ""


# ---- fragments alone


def test_pieces_of_any_ranks_make_the_whole(tmp_path: Path) -> None:
    """Five numbers, saved by three ranks with padding at the end, read by two."""
    weight, memory = torch.arange(5.0), torch.arange(5.0) * 10
    paths = []
    for rank, (start, length) in enumerate([(0, 2), (2, 2), (4, 1)]):
        shard, momentum = torch.full((2,), -1.0), torch.full((2,), -1.0)
        shard[:length], momentum[:length] = weight[start : start + length], memory[start : start + length]
        piece = Fragment(name="w", start=start, length=length, shard=shard, offset=0)
        paths.append(tmp_path / str(rank))
        save(paths[-1], [piece], {shard: {"exp_avg": momentum, "step": torch.tensor(7.0)}})
    stored = Stored(paths)
    stored.require({"w": 5})
    for start, length in [(0, 3), (3, 2)]:
        shard = torch.zeros(4)
        state: dict[torch.Tensor, dict[str, object]] = {}
        stored.fill([Fragment(name="w", start=start, length=length, shard=shard, offset=1)], state)
        assert shard.tolist() == [0, *weight[start : start + length].tolist(), *[0] * (3 - length)]
        found = state[shard]["exp_avg"]
        assert isinstance(found, torch.Tensor)
        assert found[1 : 1 + length].tolist() == memory[start : start + length].tolist()
        assert state[shard]["step"] == 7
    with pytest.raises(ValueError, match="4 of 5 numbers of w: a rank's part is missing"):
        Stored(paths[:2]).require({"w": 5})
    with pytest.raises(ValueError, match=r"only one of the two has \['v'\]"):
        stored.require({"w": 5, "v": 1})
    with pytest.raises(FileNotFoundError):
        Stored([*paths, tmp_path / "3"])


def test_what_was_forgotten_stays_forgotten(tmp_path: Path) -> None:
    """A backbone that was frozen has no memory: its next step is a first one, on any number of ranks."""
    shard = torch.ones(3)
    piece = Fragment(name="w", start=0, length=3, shard=shard, offset=0)
    save(tmp_path / "0", [piece], {})
    state: dict[torch.Tensor, dict[str, object]] = {shard: {"exp_avg": torch.ones(3)}}
    Stored([tmp_path / "0"]).fill([piece], state)
    assert state == {}
