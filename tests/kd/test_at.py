"""AT against its equation in loops."""

import math

import pytest
import torch

from data_sharding.batch import Taps
from kd.methods.at import Config, Loss
from tests.kd import fake


def unit(levels: torch.Tensor) -> list[float]:
    """One image's (C, H, W) map -> its energies, as a vector of length 1."""
    energies = [sum(v * v for v in cell) / len(cell) for cell in levels.double().flatten(1).T.tolist()]
    length = math.sqrt(sum(e * e for e in energies))
    return [e / length for e in energies]


def test_the_loss_is_half_the_mean_squared_difference_of_unit_energy_maps() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2, fake.wider())
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        for i in range(2):
            pairs = list(zip(unit(s[i]), unit(t[i]), strict=True))
            expected += sum((a - b) ** 2 for a, b in pairs) / len(pairs) / 2 / 2
    found = fake.run(Loss(Config(), fake.pair(teacher=fake.wider())), student, teacher, fake.batch(2))["feat"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_scale_and_sign_do_not_matter_and_nothing_is_learned() -> None:
    teacher, method = fake.taps(2, 1), Loss(Config(), fake.pair())
    student = Taps(None, tuple(-7 * x for x in teacher.pyramid))
    assert fake.run(method, student, teacher, fake.batch(2))["feat"].item() == pytest.approx(0, abs=1e-8)
    assert list(method.parameters()) == []


def test_a_student_of_zeros_has_a_finite_gradient() -> None:
    student = fake.require_grad(Taps(fake.taps(1, 1).c5, tuple(torch.zeros_like(x) for x in fake.taps(1, 1).pyramid)))
    loss = fake.run(Loss(Config(), fake.pair()), student, fake.taps(1, 2), fake.batch(1))["feat"]
    loss.backward()
    assert loss > 0
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student.pyramid)
