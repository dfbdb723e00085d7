"""HKD: its terms in float64 loops, its weights per level, and the moving averages that bring its terms to one size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Taps
from data_sharding.world import World
from kd.blocks.unit_scale import UnitScale
from kd.methods.hkd import TERMS, Config, Loss
from tests.kd import fake


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def terms(student: Taps, teacher: Taps, **settings: Any) -> dict[str, float]:
    method = Loss(Config(**settings), fake.pair())
    return {name: x.item() for name, x in fake.run(method, student, teacher, fake.batch(2)).items()}


def energy(plane: Tensor) -> list[float]:
    """(C, H, W) -> its cells' mean squares as a vector of length 1."""
    cells = [sum(v * v for v in cell) / len(cell) for cell in plane.double().flatten(1).T.tolist()]
    length = sum(c * c for c in cells) ** 0.5
    return [c / length for c in cells]


def regions(plane: Tensor, grid: int) -> list[float]:
    """(C, H, W) -> the means over grid x grid regions, whose edges round outwards."""
    _, rows, columns = plane.shape
    found: list[float] = []
    for i in range(grid):
        for j in range(grid):
            down = slice(i * rows // grid, -(-(i + 1) * rows // grid))
            across = slice(j * columns // grid, -(-(j + 1) * columns // grid))
            found += plane[:, down, across].double().mean((1, 2)).tolist()
    return found


def mean_square(mine: list[float], its: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(mine, its, strict=True)) / len(mine)


def test_terms_are_their_equations() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = dict.fromkeys(TERMS, 0.0)
    for weight, s, t in zip((1.0, 2.0, 0.5), student.pyramid, teacher.pyramid, strict=True):
        for a, b in zip(s, t, strict=True):
            expected["spatial"] += mean_square(a.double().flatten().tolist(), b.double().flatten().tolist()) / 2
            expected["semantic"] += weight * mean_square(energy(a), energy(b)) / 2
            expected["contextual"] += sum(mean_square(regions(a, g), regions(b, g)) for g in (1, 2, 4)) / 3 / 2
    found = terms(student, teacher, scale="none", semantic=(1.0, 2.0, 0.5))
    assert found == pytest.approx(expected, rel=1e-5)


def test_levels_above_the_coarsest_and_terms_without_weight_are_left_out() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    other = Taps(teacher.c5, (*teacher.pyramid[:2], teacher.pyramid[2] + 1))
    assert terms(student, other, coarsest=4) == terms(student, teacher, coarsest=4)
    assert terms(student, other) != terms(student, teacher, scale="none")
    assert list(terms(student, teacher, semantic=(0.0,))) == ["spatial", "contextual"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial": (1.0, 1.0)}, "2 weights, the student 3 levels"),
        ({"coarsest": 2}, "below every level"),
        ({"semantic": ()}, "must be one weight"),
        ({"grids": (0,)}, "must be"),
        ({"decay": 1.0}, "must be >= 1 and decay"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loss(Config(**settings), fake.pair())


# ---- terms of one size


def test_every_term_begins_at_its_weight() -> None:
    """In value; the gradient is the plain one divided by the term's size."""
    teacher = fake.taps(2, 2)
    student, other = (fake.require_grad(fake.taps(2, 1)) for _ in range(2))
    unit, plain = (Loss(Config(scale=scale), fake.pair()) for scale in ("ema", "none"))  # pyright: ignore
    found = fake.run(unit, student, teacher, fake.batch(2))
    assert {name: x.item() for name, x in found.items()} == pytest.approx(dict.fromkeys(TERMS, 3.0))
    found["spatial"].backward()
    fake.run(plain, other, teacher, fake.batch(2))["spatial"].backward()
    for mine, its, s, t in zip(student.pyramid, other.pyramid, fake.taps(2, 1).pyramid, teacher.pyramid, strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        torch.testing.assert_close(mine.grad, its.grad / (s - t).square().mean(), rtol=1e-4, atol=1e-7)


def test_averages_follow_then_settle_and_are_saved() -> None:
    scale = UnitScale(2, settle=2, decay=0.5, world=World())
    values = [torch.tensor([2.0, 10.0]), torch.tensor([4.0, 40.0]), torch.tensor([8.0, 80.0])]
    # Averages of the values so far, each weighing half of the next one.
    usual = [torch.tensor([2.0, 10.0]), torch.tensor([10 / 3, 30.0]), torch.tensor([10 / 3, 30.0])]
    for value, divisor in zip(values, usual, strict=True):
        torch.testing.assert_close(scale(value), value / divisor)
    resumed = UnitScale(2, settle=2, decay=0.5, world=World())
    resumed.load_state_dict(scale.state_dict())
    assert torch.equal(resumed(values[0]), scale(values[0]))
    assert resumed.steps == 4


def test_outside_training_nothing_is_averaged() -> None:
    scale = UnitScale(1, settle=5, decay=0.9, world=World()).eval()
    assert scale(torch.tensor([7.0])).item() == 7
    assert scale.steps == 0


def test_a_term_that_is_zero_stays_zero() -> None:
    x = torch.zeros(1, requires_grad=True)
    loss = UnitScale(1, settle=5, decay=0.9, world=World())(x).sum()
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.item() == 1


def test_the_average_is_of_the_sum_over_ranks() -> None:
    class Pair(World):
        """Two ranks with equal parts, as one process sees it."""

        def sum(self, x: Tensor) -> Tensor:
            return 2 * x

    scale = UnitScale(1, settle=5, decay=0.9, world=Pair())
    assert scale(torch.tensor([3.0])).item() == pytest.approx(0.5), "a share of a whole of 1"


def test_accumulation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 accumulated.*hkd.scale to none"):
        Loss(Config(), fake.pair(accumulate=4))
    Loss(Config(scale="none"), fake.pair(accumulate=4))
