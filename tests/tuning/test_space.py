"""Spaces: what is drawn, what a grid holds, and every mistake told at once before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.grammar import ConfigError
from cluster.grammar import find as find_recipe
from cluster.part import Part
from data_sharding.datasets import digits
from data_sharding.pack import pack
from tuning import space as spaces
from tuning.plan import Plan, make_plan
from tuning.space import Space

ROOT = Path(__file__).parents[2]
OPEN = {
    "data.train.images": "a", "data.train.annotations": "b", "data.val.images": "c", "data.val.annotations": "d",
    "student.backbone.weights": "w", "teachers.0.weights": "t",
}  # fmt: skip
FIVE_LEVELS = {"student.levels": [2, 3, 4, 5, 6]}
"""Table 7 asks for P5 too."""
GIVEN: dict[str, dict[str, Any]] = {
    "hmkd_table7": FIVE_LEVELS,
    "teacher": {"space.teachers.0.weights": {"choice": ["small", "large"]}},
}


def planned(recipe: str, space: str | Path, **given: Any) -> Plan:
    return make_plan(Part("cluster.config"), find_recipe(recipe), spaces.find(space), given)


def read(tmp_path: Path, text: str) -> Space:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    space, wrong = spaces.load(path, {})
    assert not wrong
    return space


@pytest.mark.parametrize("name", spaces.shipped())
def test_every_shipped_space_fits_a_shipped_recipe(name: str) -> None:
    plan = planned("hit_uav_two_core", name, **OPEN, **GIVEN.get(name, {}))
    assert plan.trials >= 2
    assert plan.name == f"hit_uav_two_core_{name}"


CONDITIONAL = """
methods: [mkd]
keys:
  distill.mkd.generator: {choice: [false, true]}
  distill.mkd.zeta: {choice: [0.2, 0.5], when: {distill.mkd.generator: true}}
  distill.mkd.mask: {choice: [symmetric, literal], when: {distill.mkd.zeta: [0.5]}}
"""


def test_a_key_with_a_condition_is_drawn_only_where_it_holds(tmp_path: Path) -> None:
    g, z, m = "distill.mkd.generator", "distill.mkd.zeta", "distill.mkd.mask"
    assert read(tmp_path, CONDITIONAL).grid() == [
        {g: False},
        {g: True, z: 0.2},
        {g: True, z: 0.5, m: "symmetric"},
        {g: True, z: 0.5, m: "literal"},
    ]


def test_probes_reach_conditional_values(tmp_path: Path) -> None:
    probes = read(tmp_path, CONDITIONAL).probes()
    assert {"distill.mkd.generator": True, "distill.mkd.zeta": 0.5, "distill.mkd.mask": "literal"} in probes


def test_a_grid_of_a_continuous_key_needs_points(tmp_path: Path) -> None:
    with_points = read(tmp_path, "keys: {optim.lr: {loguniform: [1e-4, 1e-2], points: 3}}")
    assert [draw["optim.lr"] for draw in with_points.grid()] == pytest.approx([1e-4, 1e-3, 1e-2])
    with pytest.raises(ConfigError, match=r"optim\.lr: a grid needs `points: N`"):
        read(tmp_path, "keys: {optim.lr: {loguniform: [1e-4, 1e-2]}}").grid()


def test_a_named_value_is_laid_over_the_recipe_and_an_empty_one_empties(tmp_path: Path) -> None:
    space = read(tmp_path, "keys: {distill: {choice: {none: {}, weak: {mkd: {weight: 0.1, fad: 0.0}}}}}")
    assert space.changes({"distill": "none"}) == {"distill": {}}
    assert space.changes({"distill": "weak"}) == {"distill.mkd.weight": 0.1, "distill.mkd.fad": 0.0}


def test_methods_keep_the_recipes_own_settings_of_them(tmp_path: Path) -> None:
    space = read(tmp_path, "methods: [mkd, pkd]\nsettings: {optim.steps: 7}\nkeys: {optim.lr: {uniform: [0, 1]}}")
    recipe = {"distill": {"mkd": {"weight": 3.0}, "fgd": {}}, "optim": {"steps": 1, "lr": 2}}
    assert space.laid_over(recipe, {"optim.lr": 5}) == {
        "distill": {"mkd": {"weight": 3.0}, "pkd": {}},
        "optim": {"steps": 7, "lr": 5},
    }


WRONG = """
keys:
  distill.scalekd.alhpa: {uniform: [0.0, 1.0]}
  distill.scalekd.beta: {uniform: [-1.0, 1.0]}
  distill.hmkd.start_layer: {choice: [3, 7]}
  optim.lr: {lognormal: [1, 2]}
  optim.clip_norm: {uniform: [2.0, 1.0]}
  optim.ema: {choice: [0.9], when: {optim.lrr: 1}}
  seed: {choice: [0, 1]}
  views.flip: {uniform: [0.0, 1.0]}
search: {searcher: tpee, objectives: [AP_smal], trials: 0}
"""


def test_all_mistakes_are_told_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    with pytest.raises(ConfigError) as told:
        planned("digits_scalekd", path, **{"teachers.0.weights": "t", "distill.hmkd": {}, "search.kep": 2})
    for part in (
        "distill.scalekd.alhpa: no such setting; did you mean 'alpha'?",
        "beta must be >= 0",
        "distill.hmkd.start_layer asks for P6, P7, which the student lacks: its pyramid has P2, P3, P4",
        "optim.lr: expected one of uniform, loguniform, int, choice",
        "optim.clip_norm: the lower end must be below the upper one",
        "optim.ema: when names 'optim.lrr', which is no key before this one",
        "seed: is not searched",
        "views.flip: each value needs data and caches of its own",
        "search.searcher: ",
        "search.kep: no such setting; did you mean 'keep'?",
    ):
        assert part in str(told.value), str(told.value)


def test_an_unknown_objective_is_told_with_what_is_near() -> None:
    with pytest.raises(ConfigError, match="no number 'AP_smal'; did you mean 'AP_small'"):
        planned("digits_scalekd", "scalekd", **{"teachers.0.weights": "t", "search.objectives": ["AP_smal"]})


def test_a_method_that_the_recipe_lacks_is_not_added_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("keys: {distill.pkd.weight: {uniform: [0.0, 1.0]}}")
    with pytest.raises(ConfigError, match="the recipe does not distil with 'pkd'"):
        planned("digits_scalekd", path, **{"teachers.0.weights": "t"})


ASHA = {"teachers.0.weights": "t", "search.stopping": "asha", "evaluation.every": 20}


def test_asha_begins_after_the_last_ramp() -> None:
    gate = {"distill.scalekd.start": 0.25, "distill.scalekd.ramp": 0.05}
    plan = planned("digits_scalekd", "scalekd", **ASHA, **gate)
    assert (plan.timing.steps, plan.timing.grace, plan.timing.rungs) == (200, 60, (60, 180))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"search.grace": 0.2}, "until then all students are alike"),
        ({"evaluation.every": 0}, "asha needs evaluations on the way"),
        ({"evaluation.every": 200}, "asha finds no evaluation between"),
    ],
)
def test_asha_that_would_be_a_lottery_is_refused(more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        planned("digits_scalekd", "scalekd", **(ASHA | {"distill.scalekd.start": 0.4} | more))


def test_the_latest_gate_that_is_searched_counts(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("keys: {distill.scalekd.start: {uniform: [0.0, 0.5]}}")
    assert planned("digits_scalekd", path, **ASHA).timing.grace == 100


def test_an_objective_that_the_validation_set_cannot_give_is_refused(tmp_path: Path) -> None:
    """Digits of 40 to 60 px: no object is small. The set is packed already, so that it is known at once."""
    given = {
        "teachers.0.weights": "t", "storage": str(tmp_path), "data.train": 4, "data.val": 2,
        "data.digit_size": [40, 60], "data.image_size": 256, "distill.scalekd.alhpa": 1,
    }  # fmt: skip
    settings = Part("cluster.config")
    config = settings.load(find_recipe("digits_scalekd"), {k: v for k, v in given.items() if "alhpa" not in k})
    folder = settings.beside("cluster.build").split_folder(config, "val")
    made = digits.Config(train=4, val=2, digit_size=(40, 60), image_size=256, objects=(16, 32))
    pack(made, digits, "val", folder)
    with pytest.raises(ConfigError) as told:
        planned("digits_scalekd", "scalekd", **{k: v for k, v in given.items() if "alhpa" not in k})
    assert "the validation set cannot give AP_small" in str(told.value)
    medium = {k: v for k, v in given.items() if "alhpa" not in k} | {"search.objectives": ["AP_medium"]}
    assert planned("digits_scalekd", "scalekd", **medium).options.objectives == ("AP_medium",)


def test_a_mistake_is_told_without_importing_torch_or_ray() -> None:
    code = (
        "import sys; from tuning.search import main; code = main(['digits_scalekd', 'scalekd', 'optim.lrr=1']); "
        "sys.exit(9 if {'torch', 'ray', 'optuna'} & set(sys.modules) else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "optim.lrr: no such setting; did you mean 'lr'?" in done.stderr
    assert "teachers.0.weights: the recipe leaves this to you" in done.stderr


TWO_KEYS = """
keys:
  distill.scalekd.alpha: {loguniform: [1e-4, 1.0]}
  distill.scalekd.csa.heads: {choice: [2, 4]}
"""
LATE = {"teachers.0.weights": "t", "distill.scalekd.start": 0.3}


def test_a_common_warmup_is_planned_where_keys_act_after_the_gate_alone(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(TWO_KEYS)
    plan = planned("digits_scalekd", path, **LATE)
    assert (plan.timing.gate, plan.timing.late) == (60, {"distill.scalekd.alpha"})
    same = [{"distill.scalekd.alpha": a, "distill.scalekd.csa.heads": 2} for a in (0.1, 0.2)]
    assert plan.early(same[0]) == plan.early(same[1])
    assert plan.early(same[0]) != plan.early(same[0] | {"distill.scalekd.csa.heads": 4})
    assert plan.early(same[0]) != plan.early(same[0] | {"distill.scalekd.alpha": 0.0})


@pytest.mark.parametrize(
    "more",
    [
        {"search.warmup": "own"},
        {"search.trials": 5},
        {"distill.scalekd.start": 0.0},
        {"space.distill.scalekd.freeze": {"uniform": [0.0, 0.2]}},
        {"space.distill.scalekd.start": {"choice": [0.2, 0.3]}},
        {"space.distill.scalekd.alpha": None},
    ],
)
def test_no_common_warmup_where_it_would_spare_nothing(tmp_path: Path, more: dict[str, Any]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(TWO_KEYS)
    assert planned("digits_scalekd", path, **(LATE | more)).timing.gate == 0


def test_a_common_warmup_that_costs_more_than_it_spares_must_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(TWO_KEYS)
    assert planned("digits_scalekd", path, **(LATE | {"search.trials": 5, "search.warmup": "shared"})).timing.gate == 60
