"""A worker that is cut off at any moment of its work and begins again ends in the same weights and metrics: what it
does about it by itself, with the plain engine and without Ray, whose part is in `make test-faults`. There two ranks
with DeepSpeed are cut off too."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from cluster import packing, results, worker
from cluster.config import to_tree
from cluster.metric_log import MEASURED
from cluster.ranks.watching import Watch
from cluster.recovery import incidents
from cluster.worker import Job, Worker
from data_sharding.world import World
from kd.engine import PlainEngine
from tests.cluster.test_build import recipe, save_teacher
from tests.cluster.two_ranks import Ranks

PATIENCE = 900.0
STEPS, SAVE_EVERY, EVALUATE_EVERY = 7, 2, 3


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


def work(world: World, tree: dict[str, Any], folder: str, moment: str, step: int) -> dict[str, Any]:
    """On a rank: go on with the run until its end, or until it is cut off at a moment."""
    attempt = len(list((Path(folder) / results.TRAIN).glob("*")))
    world.barrier()

    def kept(metrics: dict[str, Any], checkpoint: Path) -> None:
        """As Ray Train does: every rank copies its files into one folder."""
        target = Path(folder) / results.TRAIN / f"checkpoint_{attempt:03d}_{metrics['step']:03d}"
        target.mkdir(parents=True, exist_ok=True)
        files = sorted(checkpoint.iterdir())
        half = moment == "saving" and metrics["step"] == step and world.rank == world.size - 1
        for file in files[: len(files) // 2] if half else files:
            shutil.copy(file, target)
        world.barrier()
        if moment == "saving" and metrics["step"] == step:
            raise Killed

    def cut(what: str, act: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(step if moment == what else 1000))

        def doing(*given: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                raise Killed
            return act(*given, **named)

        return doing

    train = SimpleNamespace(
        report=kept, Checkpoint=SimpleNamespace(from_directory=Path), get_preemption_info=lambda: None
    )
    found = Worker(Job(tree=tree, folder=folder, run=None), world, torch.device("cpu"))
    with (
        mock.patch.dict(sys.modules, {"ray": SimpleNamespace(train=train, nodes=lambda: []), "ray.train": train}),
        mock.patch.object(worker, "train_step", cut("training", worker.train_step)),
        mock.patch.object(worker, "score", cut("evaluating", worker.score)),
    ):
        if world.size == 1:
            found.engine = PlainEngine(found.distiller, found.config.optim, world)
            found.watch = Watch(world, torch.device("cpu"), 0, Path(folder))
        else:
            found.start()
        try:
            return found.run()
        except Killed:
            return {"killed": True}


Go = Callable[..., list[dict[str, Any]]]
"""`work` on all ranks, by its arguments after the world."""


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=[pytest.mark.faults, pytest.mark.cluster])])
def go(request: pytest.FixtureRequest) -> Iterator[Go]:
    if request.param == 1:
        yield lambda *given: [work(World(), *given)]
        return
    pair = Ranks(request.param, patience=PATIENCE)
    yield lambda *given: pair(work, *given)
    pair.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, go: Go) -> tuple[Path, dict[str, Any]]:
    storage = tmp_path_factory.mktemp("storage")
    settings = {
        "teachers.0.cache": False, "distill.scalekd.start": 0.2, "optim.steps": STEPS, "optim.warmup": 1,
        "optim.batch": 4, "optim.ema": 0.9,
        "evaluation.every": EVALUATE_EVERY, "resources.workers": 2, "resources.zero": 2, "resources.threads": 1,
        "resources.checkpoint_every": SAVE_EVERY,
    }  # fmt: skip
    config = recipe(storage, save_teacher(storage / "weights"), **settings)
    packing.pack_splits(config)
    folder = storage / "undisturbed"
    folder.mkdir()
    found = go(to_tree(config), str(folder), "never", 0)
    assert "metrics" in found[0]
    return folder, to_tree(config)


def numbers(folder: Path) -> list[tuple[int, str, float]]:
    rows = [json.loads(line) for line in (folder / results.METRICS).open()]
    found = [(row["s"], key, value) for row in rows for key, value in row["m"].items()]
    return sorted(row for row in found if not row[1].startswith(MEASURED))


def sha256(folder: Path) -> str:
    return json.loads((folder / "student" / "student.json").read_text())["sha256"]


@pytest.mark.parametrize(
    ("moment", "at", "resumed", "redone"),
    [
        ("training", 0, 0, 0),
        ("training", 5, 4, 1),
        ("saving", 4, 2, 2),
        ("saving", STEPS, 6, 1),
        ("evaluating", 1, 4, 2),
    ],
)
def test_a_run_that_is_cut_off_ends_as_the_undisturbed_one(
    undisturbed: tuple[Path, dict[str, Any]],
    go: Go,
    tmp_path: Path,
    moment: str,
    at: int,
    resumed: int,
    redone: int,
) -> None:
    whole, tree = undisturbed
    assert all(found == {"killed": True} for found in go(tree, str(tmp_path), moment, at))
    assert "metrics" in go(tree, str(tmp_path), "never", 0)[0]
    assert sha256(tmp_path) == sha256(whole)
    assert numbers(tmp_path) == numbers(whole)
    noted = incidents.read(tmp_path)
    assert [(row["step"], row["redone"]) for row in noted if "step" in row] == (
        [(resumed, redone)] if resumed or redone else []
    )
    assert [row["what"] for row in noted if "what" in row] == [
        row["what"] for row in noted if "is not whole" in row.get("what", "") and moment == "saving"
    ]
    assert not [row for row in noted if "now" in row], "a step that was done again came out otherwise"


def test_a_step_that_comes_out_otherwise_is_reported(
    undisturbed: tuple[Path, dict[str, Any]], go: Go, tmp_path: Path
) -> None:
    """By workers that see other images, say: here the rows are changed."""
    _, tree = undisturbed
    go(tree, str(tmp_path), "training", 5)
    path = tmp_path / results.METRICS
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        row["m"] |= {"loss/total": 9.0} if row["s"] == 4 and "loss/total" in row["m"] else {}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    go(tree, str(tmp_path), "never", 0)
    (told,) = [row["now"] for row in incidents.read(tmp_path) if "now" in row]
    assert told.startswith("loss/total of step 4 was 9.0 and is")
