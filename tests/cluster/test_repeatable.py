"""Deterministic algorithms without torch filling fresh memory: sound as long as nothing reads what nobody wrote."""

from collections.abc import Iterator

import pytest
import torch

from cluster.repeatable import repeatable
from data_sharding.world import World
from tests.kd.runs import Run, every_method, same, train


@pytest.fixture(autouse=True)
def torchs_own() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_no_step_reads_what_nobody_wrote(detector: str) -> None:
    every = every_method()
    if detector == "faster_rcnn":
        del every["ld"]  # its boxes are no distributions
    run = Run(detector=detector, distill=every, steps=2)
    repeatable(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is False  # pyright: ignore[reportAttributeAccessIssue]
    quick = train(World(), run)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.empty(3).isnan().all()
    filled = train(World(), run)
    assert quick.losses == filled.losses
    assert same(quick.states[-1], filled.states[-1])


def test_it_can_be_switched_off() -> None:
    repeatable(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
