"""MKD: its three terms in float64 loops, its frequency mask, and the control it must beat."""

import cmath
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import multiprocessing as mp

from data_sharding.batch import Taps
from data_sharding.world import World
from kd.blocks.draw import chances
from kd.blocks.frequency import filtered, frequency_mask
from kd.methods import cwd, fitnet
from kd.methods.mkd import Config, Loss
from tests.kd import fake


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def terms(student: Taps, teacher: Taps, images: int = 2, **settings: Any) -> dict[str, float]:
    method = Loss(Config(**settings), fake.pair())
    found = fake.run(method, student, teacher, fake.batch(images))
    return {name: value.item() for name, value in found.items()}


def waves(plane: Tensor) -> list[list[complex]]:
    """The orthonormal discrete Fourier transform, by its definition."""
    rows, columns, values = *plane.shape, plane.tolist()
    return [
        [
            sum(
                values[y][x] * cmath.exp(-2j * math.pi * (v * y / rows + u * x / columns))
                for y in range(rows)
                for x in range(columns)
            )
            / math.sqrt(rows * columns)
            for u in range(columns)
        ]
        for v in range(rows)
    ]


def plane_of(found: list[list[complex]]) -> Tensor:
    rows, columns = len(found), len(found[0])
    return torch.tensor(
        [
            [
                sum(
                    found[v][u] * cmath.exp(2j * math.pi * (v * y / rows + u * x / columns))
                    for v in range(rows)
                    for u in range(columns)
                ).real
                / math.sqrt(rows * columns)
                for x in range(columns)
            ]
            for y in range(rows)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("mask", ["symmetric", "literal"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 4)])
def test_filtering_is_masking_the_transform_of_the_definition(mask: Any, shape: tuple[int, int]) -> None:
    """Of a symmetric mask the inverse is real; of the literal one its imaginary part is dropped."""
    drawn, plane = torch.rand(1, *shape, dtype=torch.float64), torch.randn(shape)
    found, rows, columns = waves(plane.double()), *shape
    for v in range(rows):
        for u in range(columns):
            mirror = (-v % rows, -u % columns)
            place = min((v, u), mirror) if mask == "symmetric" else (v, u)
            if drawn[0][place] < 0.5 and not (mask == "symmetric" and (v, u) == (0, 0)):
                found[v][u] = 0
    mine = filtered(plane[None, None], frequency_mask(drawn, 0.5, mask))[0, 0]
    torch.testing.assert_close(mine.double(), plane_of(found), rtol=1e-5, atol=1e-5)


def test_a_symmetric_mask_keeps_the_mean_and_half_of_the_waves() -> None:
    x, drawn = torch.randn(2, 3, 40, 41), torch.rand(2, 40, 41)
    rest = filtered(x, frequency_mask(drawn, 0.5, "symmetric"))
    torch.testing.assert_close(rest.mean((2, 3)), x.mean((2, 3)), rtol=1e-4, atol=1e-6)
    assert rest.square().sum() / x.square().sum() == pytest.approx(0.5, abs=0.1)


def test_the_literal_mask_loses_a_quarter_of_the_surviving_energy() -> None:
    """At zeta 1/2: the dropped imaginary part (M2)."""
    x, drawn = torch.randn(4, 8, 40, 40), torch.rand(4, 40, 40)
    rest = filtered(x, frequency_mask(drawn, 0.5, "literal"))
    surviving = (torch.fft.fft2(x, norm="ortho") * (drawn >= 0.5)[:, None]).abs().square().sum()
    assert 1 - rest.square().sum() / surviving == pytest.approx(0.25, abs=0.03)


def test_terms_are_their_equations() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = {"multiscale": 0.0, "fdmd": 0.0, "fad": 0.0, "plain": 0.0}
    drawn = [chances(("mkd", level), (0, 1), tuple(s.shape[2:])) for level, s in enumerate(student.pyramid)]  # pyright: ignore
    for level, (s, t) in enumerate(zip(student.pyramid, teacher.pyramid, strict=True)):
        mask = frequency_mask(drawn[level], 0.5, "symmetric")
        expected["fdmd"] += (filtered(s, mask).double() - t.double()).square().mean().item()
        expected["plain"] += (s.double() - t.double()).square().mean().item()
        for k in (1, 2, 4):
            errors = []
            for y in range(0, s.shape[2], k):
                for x in range(0, s.shape[3], k):
                    window = (slice(None), slice(None), slice(y, y + k), slice(x, x + k))
                    errors.append((s[window].double().mean((2, 3)) - t[window].double().mean((2, 3))).square().mean())
            expected["multiscale"] += float(sum(errors)) / len(errors) / 3
    expected["fad"] = fake.run(
        cwd.Loss(cwd.Config(temperature=2.0), fake.pair()), student, teacher, fake.batch(2)
    )["feat"].item()  # fmt: skip
    found = terms(student, teacher, plain=1.0, temperature=2.0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_mask_fdmd_is_fitnet() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    hints = fake.run(fitnet.Loss(fitnet.Config(), fake.pair()), student, teacher, fake.batch(2))["feat"].item()
    for mask in ("symmetric", "literal"):
        assert terms(student, teacher, zeta=0.0, mask=mask)["fdmd"] == pytest.approx(hints, rel=1e-5)


def test_weights_leave_terms_out_and_a_generator_has_weights() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    whole = terms(student, teacher)
    assert list(whole) == ["multiscale", "fdmd", "fad"]
    assert list(terms(student, teacher, fdmd=0.0)) == ["multiscale", "fad"]
    assert terms(student, teacher, fad=3.0)["fad"] == pytest.approx(3 * whole["fad"], rel=1e-5)
    assert list(Loss(Config(), fake.pair()).parameters()) == []
    assert list(Loss(Config(generator=True), fake.pair()).parameters())
    assert terms(student, teacher, generator=True)["fdmd"] != pytest.approx(whole["fdmd"], rel=1e-3)


def test_masks_are_drawn_per_epoch_and_image() -> None:
    method, student, teacher = Loss(Config(), fake.pair()), fake.taps(2, 1), fake.taps(2, 2)

    def fdmd(**changes: Any) -> float:
        return fake.run(method, student, teacher, replace(fake.batch(2), **changes))["fdmd"].item()

    assert fdmd(key=(0, 1)) == fdmd(key=(0, 1))
    assert fdmd(key=(0, 1)) != fdmd(key=(0, 2))
    assert fdmd(image_ids=(0, 1)) != fdmd(image_ids=(0, 2))


@pytest.mark.parametrize("settings", [{"zeta": 1.0}, {"pools": ()}, {"temperature": 0.0}, {"fad": -1.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Config(**settings)


# ---- the control


def test_a_batch_normalised_channel_has_no_scale_and_no_offset() -> None:
    method = cwd.Loss(cwd.Config(norm="bn_noaffine"), fake.pair())
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    other = Taps(student.c5, tuple(7 * x - 30 for x in student.pyramid))
    one, two = (fake.run(method, x, teacher, fake.batch(2))["feat"].item() for x in (student, other))
    assert two == pytest.approx(one, rel=1e-3)


def test_the_control_is_cwd_of_torchs_batch_norm() -> None:
    student, teacher, images = fake.require_grad(fake.taps(3, 1)), fake.taps(3, 2), fake.batch(3)
    plain, control = (cwd.Loss(cwd.Config(norm=norm), fake.pair()) for norm in ("none", "bn_noaffine"))  # pyright: ignore

    def normal(taps: Taps) -> Taps:
        return Taps(taps.c5, tuple(torch.nn.functional.batch_norm(x, None, None, training=True) for x in taps.pyramid))

    expected = fake.run(plain, normal(student), normal(teacher), images)["feat"]
    found = fake.run(control, student, teacher, images)["feat"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, its in zip(
        torch.autograd.grad(found, student.pyramid), torch.autograd.grad(expected, student.pyramid), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="2 accumulated"):
        cwd.Loss(cwd.Config(norm="bn_noaffine"), fake.pair(accumulate=2))


def _control_part(world: World, part: slice) -> tuple[float, list[Tensor]]:
    method = cwd.Loss(cwd.Config(norm="bn_noaffine"), fake.pair(world=world))
    student, teacher = fake.require_grad(fake.rows(fake.taps(3, 1), part)), fake.rows(fake.taps(3, 2), part)
    loss = fake.run(method, student, teacher, fake.batch(len(range(3)[part]), totals=3))["feat"]
    loss.backward()
    return loss.item(), [x.grad for x in student.pyramid if x.grad is not None]


def _on_rank(rank: int, meeting: str, found: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.save(_control_part(World(rank=rank, size=2), (slice(0, 1), slice(1, 3))[rank]), f"{found}.{rank}")
    torch.distributed.destroy_process_group()


def _on_spawned(_: int, meeting: str, found: str) -> None:
    _on_rank(1, meeting, found)


@pytest.mark.cluster
def test_the_control_over_two_ranks_is_the_control_over_the_whole_batch(tmp_path: Path) -> None:
    where = (f"{tmp_path}/meeting", f"{tmp_path}/found")
    child = mp.spawn(_on_spawned, args=where, nprocs=1, join=False)  # pyright: ignore
    _on_rank(0, *where)
    assert child is not None
    assert child.join(60)
    (loss_0, taps_0), (loss_1, taps_1) = (torch.load(f"{where[1]}.{rank}") for rank in (0, 1))
    loss, taps = _control_part(World(), slice(0, 3))
    assert loss_0 + loss_1 == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(
        [torch.cat(both) for both in zip(taps_0, taps_1, strict=True)], taps, rtol=1e-4, atol=1e-7
    )
