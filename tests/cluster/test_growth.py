"""How many workers a run may have, and when it takes in more."""

from types import SimpleNamespace

import pytest

from cluster.config import RunConfig, load
from cluster.grammar import ConfigError
from cluster.recovery import growth
from cluster.recovery.growth import Nodes, Notice, fits, told
from data_sharding.world import World


def recipe(**settings: object) -> RunConfig:
    return load("digits_student", {key.replace("__", "."): value for key, value in settings.items()})


def test_a_number_stays_a_number() -> None:
    resources = recipe(resources__workers=3).resources
    assert resources.workers == 3
    assert (resources.least_workers, resources.most_workers) == (3, 3)


def test_two_numbers_are_the_least_and_the_most() -> None:
    config = recipe(resources__workers=[2, 4], optim__batch=16)
    assert (config.resources.least_workers, config.resources.most_workers) == (2, 4)
    assert config.micro_batch == 8  # of two workers: what memory must hold


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (0, "workers must be a number >= 1, or"),
        ([3, 2], "1 <= least <= most, got"),
        ([0, 2], "1 <= least <= most, got"),
        ([1, 2, 3], "resources.workers"),
        ("many", "resources.workers"),
        ([1, 64], "optim.batch: 16 images cannot be shared by resources.workers=64"),
    ],
)
def test_what_cannot_be_is_refused(workers: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe(resources__workers=workers, optim__batch=16)
    assert message in str(error.value)


def test_workers_leave_only_where_a_node_has_joined_and_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, free = {"a"}, {"CPU": 0.0}
    monkeypatch.setattr(growth, "_alive", lambda: set(alive))
    monkeypatch.setattr(growth, "_free", lambda: dict(free))
    resources = recipe(resources__workers=[1, 2], resources__threads=2).resources
    nodes = Nodes(resources, World(), gpu=False)
    full = Nodes(recipe(resources__workers=1).resources, World(), gpu=False)
    assert not nodes.room_for_more()
    free["CPU"] = 8.0
    assert not nodes.room_for_more(), "room that was there at the start would bring the same number again"
    alive.add("b")
    assert nodes.room_for_more()
    assert not full.room_for_more()
    free["CPU"] = 1.0
    assert not nodes.room_for_more()
    assert not fits({"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0})


def test_a_notice_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.train

    info = SimpleNamespace(preempted_node_ids=["a"], preempted_ranks=[1], deadline_ms=None)
    asked = list[int]()
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(1) or info)
    notice = Notice(2)
    monkeypatch.setenv(growth.WATCHER, "1")
    assert [bool(notice.look(step)) for step in range(1, 7)] == [False, True, False, False, False, False]
    assert len(asked) == 3
    monkeypatch.setenv(growth.WATCHER, "0")
    assert not Notice(1).look(1)
    assert len(asked) == 3
    assert told([1, 2], 30_500, 10.0) == "the node of rank 1, 2 is to be taken away in 20 s"
