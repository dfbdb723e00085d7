"""What a rank does alone, and what ranks agree on before they wait for each other."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import packing
from cluster.config import to_tree
from cluster.grammar import ConfigError
from cluster.worker import Job, Worker, agreed
from data_sharding.world import World
from tests.cluster.test_build import recipe, save_teacher
from tests.cluster.two_ranks import ranks


def test_one_rank_agrees_with_itself() -> None:
    assert agreed(World(), lambda: [1]) == [1]
    with pytest.raises(ConfigError, match="no weights here"):
        agreed(World(), lambda: refused("no weights here"))
    with pytest.raises(ConfigError, match="ValueError"):
        agreed(World(), lambda: refused(""))


def test_a_bug_is_no_refusal() -> None:
    with pytest.raises(ZeroDivisionError):
        agreed(World(), lambda: 1 // 0)


def refused(why: str) -> None:
    raise ValueError(why)


def refuse_on_rank_1(world: World) -> str:
    try:
        agreed(world, lambda: refused("rank 1 sees no teacher") if world.rank == 1 else "built")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.cluster
def test_a_refusal_of_one_rank_is_told_by_all() -> None:
    """A folder that one node does not see, for example."""
    assert ranks()(refuse_on_rank_1) == ["rank 1 sees no teacher"] * 2


def build_on_rank_0(world: World, tree: dict[str, Any], folder: str) -> str:
    if world.rank == 1:
        return "left"
    Worker(Job(tree=tree, folder=folder, run=None), world, torch.device("cpu"))
    return "built"


@pytest.mark.cluster
def test_a_rank_is_built_without_waiting_for_another_that_has_left(tmp_path: Path) -> None:
    config = recipe(tmp_path, save_teacher(tmp_path / "weights"), **{"teachers.0.cache": False})
    packing.pack_splits(config)
    assert ranks()(build_on_rank_0, to_tree(config), str(tmp_path)) == ["built", "left"]
