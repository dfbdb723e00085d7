"""Values of a space that a method refuses only once it is built are told before the first trial, all at once."""

from pathlib import Path

import pytest

from cluster import config as recipes
from cluster.grammar import ConfigError, find, from_arguments
from data_sharding.datasets import digits
from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT, save_teacher
from tuning.fitting import require_fitting
from tuning.plan import Plan, make_plan

CATEGORIES = digits.categories(digits.Config())


def plan(folder: Path, heads: str) -> Plan:
    space = folder / "own.yaml"
    space.write_text(
        "keys:\n"
        "  distill.scalekd.alpha: {loguniform: [1e-4, 1e-1]}\n"
        f"  distill.scalekd.csa.heads: {{choice: {heads}}}\n"
        "  distill.scalekd.sdf.token_width: {choice: [16, 32]}\n"
    )
    rates = "distill.scalekd.csa.rates=[[2,1],[1,1],[1,1],[1,1]]"  # the recipe's end before this student's last level
    words = [
        rates,
        *SMALL_DATA,
        *SMALL_STUDENT,
        f"storage={folder}",
        f"teachers.0.weights={save_teacher(folder / 'w')}",
    ]
    return make_plan(recipes, find("digits_scalekd"), space, from_arguments(words))


def test_all_values_that_fit_nobody_are_told_with_what_was_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 mistake\(s\)") as told:
        require_fitting(plan(tmp_path, "[2, 3, 4, 5]"), lambda _: CATEGORIES)
    assert "csa.heads=3" in str(told.value)
    assert "csa.heads=5" in str(told.value)
    assert "csa.heads=2" not in str(told.value)


def test_a_space_whose_values_fit_is_let_through(tmp_path: Path) -> None:
    require_fitting(plan(tmp_path, "[2, 4]"), lambda _: CATEGORIES)
