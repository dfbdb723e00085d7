"""Promises of the blocks that methods are made of."""

from dataclasses import replace

import pytest
import torch

from data_sharding.batch import Taps
from kd.blocks.adapt import MatchChannels
from kd.blocks.align import align, check_grid, grid, level_shift, pool
from kd.blocks.divergence import share_of_mean, softened_kl, standardised_error
from kd.blocks.position import sine_code
from tests.kd import fake

ODD = (104, 136)
"""13x17, 7x9 and 4x5 cells at strides 8, 16 and 32."""


def doubled(taps_of: fake.Shapes = fake.SHAPES) -> Taps:
    """What a teacher at twice the resolution of `ODD` shows."""
    return fake.taps(2, 3, taps_of, canvas=(2 * ODD[0], 2 * ODD[1]))


def test_a_factor_of_one_changes_nothing() -> None:
    taps = fake.taps(1, 1)
    for rule in ("shift", "pool"):
        aligned = align(taps, fake.SHAPES, fake.SHAPES, 1, rule)
        assert aligned.c5 is taps.c5
        assert all(a is b for a, b in zip(aligned.pyramid, taps.pyramid, strict=True))


def test_absent_taps_stay_absent() -> None:
    assert align(Taps(), fake.SHAPES, fake.SHAPES, 2, "shift") == Taps()
    only_c5 = align(Taps(doubled().c5), fake.SHAPES, fake.SHAPES, 2, "pool")
    assert only_c5.pyramid == ()
    assert only_c5.c5 is not None


@pytest.mark.parametrize("rule", ["shift", "pool"])
def test_a_doubled_teacher_stands_on_the_students_odd_grid(rule: str) -> None:
    aligned = align(doubled(), fake.SHAPES, fake.SHAPES, 2, rule)  # pyright: ignore[reportArgumentType]
    check_grid(aligned, fake.SHAPES, ODD)
    assert [x.shape for x in fake.tensors(aligned)] == [x.shape for x in fake.tensors(fake.taps(2, 1, canvas=ODD))]


def test_shift_takes_the_coarser_level_and_subsamples_the_last() -> None:
    teacher = doubled()
    shifted = align(teacher, fake.SHAPES, fake.SHAPES, 2, "shift").pyramid
    assert shifted[0] is teacher.pyramid[1]
    assert shifted[1] is teacher.pyramid[2]
    assert torch.equal(shifted[2], teacher.pyramid[2][:, :, ::2, ::2])


def test_a_teacher_at_four_times_the_resolution_is_shifted_by_two_levels() -> None:
    teacher = fake.taps(1, 3, canvas=(4 * ODD[0], 4 * ODD[1]))
    aligned = align(teacher, fake.SHAPES, fake.SHAPES, 4, "shift")
    check_grid(aligned, fake.SHAPES, ODD)
    assert aligned.pyramid[0] is teacher.pyramid[2]


def test_levels_are_chosen_by_stride_not_by_place() -> None:
    """A teacher with a finer first level needs no invented last one."""
    finer = replace(fake.SHAPES, strides=(4, 8, 16, 32, 64))
    teacher = fake.taps(1, 3, finer, canvas=(2 * ODD[0], 2 * ODD[1]))
    aligned = align(teacher, finer, fake.SHAPES, 2, "shift").pyramid
    assert all(a is b for a, b in zip(aligned, teacher.pyramid[2:], strict=True))


def test_pool_averages_the_cells_that_exist() -> None:
    x = torch.arange(15.0).view(1, 1, 3, 5)
    expected = torch.tensor([[(0 + 1 + 5 + 6) / 4, (2 + 3 + 7 + 8) / 4, (4 + 9) / 2], [10.5, 12.5, 14.0]])
    assert torch.equal(pool(x, 2)[0, 0], expected)


@pytest.mark.parametrize("factor", [0, 3, -2])
def test_factors_that_are_no_powers_of_two_are_refused(factor: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        align(fake.taps(1, 1), fake.SHAPES, fake.SHAPES, factor)


def test_levels_that_the_teacher_lacks_are_named() -> None:
    x = fake.taps(1, 1).pyramid
    with pytest.raises(ValueError, match=r"\[4\] cannot be had"):
        level_shift(x, (8, 16, 32), (4, 8, 16))
    with pytest.raises(ValueError, match="unknown alignment 'crop'"):
        align(fake.taps(1, 1), fake.SHAPES, fake.SHAPES, 2, "crop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="c5 has stride 64, coarser than the 32"):
        align(fake.taps(1, 1), replace(fake.SHAPES, c5_stride=64), fake.SHAPES, 1)


def test_a_grid_that_is_off_by_one_is_named() -> None:
    taps = fake.taps(1, 1, canvas=ODD)
    narrow = Taps(taps.c5, (taps.pyramid[0][..., :-1], *taps.pyramid[1:]))
    with pytest.raises(ValueError, match=r"level 0 has 13x16 cells, the student's 13x17 \(canvas 104x136, stride 8\)"):
        check_grid(narrow, fake.SHAPES, ODD)
    with pytest.raises(ValueError, match="c5 has 3x5 cells"):
        check_grid(Taps(fake.taps(1, 1).c5), fake.SHAPES, ODD)
    with pytest.raises(ValueError, match="2 pyramid levels, the student 3"):
        check_grid(Taps(pyramid=taps.pyramid[1:]), fake.SHAPES, ODD)


def test_grid_rounds_up() -> None:
    assert grid((1, 129), 128) == (1, 2)


def test_equal_widths_need_no_adapter_or_start_as_the_identity() -> None:
    x = fake.taps(1, 1).pyramid
    assert list(MatchChannels(8, 8, 3).parameters()) == []
    always = MatchChannels(8, 8, 3, always=True)
    assert all(torch.equal(a, b) for a, b in zip(always(x), x, strict=True))
    assert [a.shape[1] for a in MatchChannels(8, 12, 3, kernel=3)(x)] == [12, 12, 12]


def test_shares_divide_by_the_images_of_the_global_batch() -> None:
    values = torch.tensor([[2.0, 4.0]])
    assert share_of_mean(values, torch.tensor(1.0)) == 3
    assert share_of_mean(values, torch.tensor(4.0)) == 0.75
    assert share_of_mean(values, torch.tensor(0.0)) == 3


def test_divergence_and_standardised_error_vanish_at_equality() -> None:
    x = torch.randn(2, 3, 5)
    assert softened_kl(x, x + 1, 2.0, dim=2) == pytest.approx(torch.zeros(2, 3), abs=1e-6)
    square = torch.tensor([5.0, 0.0])
    assert standardised_error(square, square, square, 10).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert standardised_error(square, square.flip(0), square * 0, 10).tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_position_codes_of_a_reduced_grid_lie_between_those_of_its_cells() -> None:
    """A 2x2 cell's centre is where four cells meet: the same place in the same unit."""
    device = torch.device("cpu")
    one = sine_code(4, 4, 8, 1, device)
    assert one.shape == (1, 8, 4, 4)
    # The centre of reduced cell 0 is at 1.0; full cells have theirs at 0.5 and 1.5.
    assert sine_code(2, 2, 8, 2, device)[0, 0, 0, 0] == pytest.approx(torch.tensor(1.0).sin().item())
    assert one[0, 0, 1, 0] == pytest.approx(torch.tensor(1.5).sin().item())
    assert len({tuple(cell) for cell in one[0].flatten(1).T.tolist()}) == 16
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sine_code(2, 2, 6, 1, device)
