"""A recipe is read strictly, all its mistakes are told at once, and it survives pickling, files and MLflow."""

import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import (
    RunConfig,
    check,
    config_hash,
    difference,
    evaluation_views,
    from_params,
    load,
    to_params,
    to_recipe,
    to_tree,
)
from cluster.grammar import (
    REQUIRED,
    ConfigError,
    flatten,
    from_arguments,
    overlay,
    parse,
    recipes,
    to_text,
    to_value,
    write,
)
from kd.plugins import plugin_names, plugins

RECIPES = recipes()
TEACHER = {"teachers.0.weights": "runs/digits_teacher/student"}


def load_with(*arguments: str) -> RunConfig:
    return load("digits_scalekd", TEACHER | from_arguments(arguments))


def filled(recipe: str) -> dict[str, Any]:
    """Something for every setting that a recipe leaves to the user."""
    tree = parse(RECIPES[recipe].read_text(), recipe)
    return {key: "somewhere" for key, value in flatten(tree).items() if value == REQUIRED}


# The grammar


@pytest.mark.parametrize("value", [1, 2e-4, True, None, "fgd", "123", "true", "", "no", "~", [800, 1333], {}, []])
def test_a_value_becomes_text_and_comes_back(value: object) -> None:
    assert to_value(to_text(value)) == value
    assert parse(write({"a": value, "b": [value]}), "test") == {"a": value, "b": [value]}


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab 01.-:#'\"{}[]~,eE\n\tä", max_size=6)
)
KEYS = st.text("abcdefgh_", min_size=1, max_size=5)
TREES = st.recursive(
    st.dictionaries(KEYS, LEAVES | st.lists(LEAVES, max_size=3), max_size=4),
    lambda below: st.dictionaries(KEYS, below | st.lists(below, min_size=1, max_size=3), max_size=4),
    max_leaves=8,
)


@given(TREES)
def test_overlay_is_the_inverse_of_flatten(tree: dict[str, Any]) -> None:
    assert overlay({}, flatten(tree)) == tree


@given(TREES)
def test_a_recipe_file_keeps_every_value(tree: dict[str, Any]) -> None:
    assert parse(write(tree), "test") == tree


def test_overlay_leaves_its_input_alone() -> None:
    tree = {"a": {"b": 1}, "c": [{"d": 1}]}
    assert overlay(tree, {"a.b": 2, "c.0.d": 2}) == {"a": {"b": 2}, "c": [{"d": 2}]}
    assert tree == {"a": {"b": 1}, "c": [{"d": 1}]}


def test_a_file_reads_plain_values_as_the_command_line_does() -> None:
    # YAML 1.1 itself would make the text '2e-4' and the truth value False of these.
    assert parse("a: 2e-4\nb: no\nc:\nd: '12'", "test") == {"a": 2e-4, "b": "no", "c": None, "d": "12"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "a is set twice"),
        ("a: [1", "not a readable recipe"),
        ("- a", "list of `key: value` lines"),
        ("", "list of `key: value` lines"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr"], "expected dotted.key=value, got 'optim.lr'"),
        (["=3"], "expected dotted.key=value"),
        (["optim..lr=3"], "expected dotted.key=value"),
        (["seed=1", "seed=2"], "seed is set twice, to 1 and to 2"),
    ],
)
def test_arguments_that_are_no_settings_say_so(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_arguments(arguments)


# Round trips


def test_a_config_survives_mlflow_pickle_and_a_file() -> None:
    config = load_with("optim.lr=5e-4", "distill.pkd.weight=3", "name=123x", "optim.ema=0.999")
    params = to_params(config)
    assert params["optim.lr"] == "0.0005"
    assert all(isinstance(value, str) and len(value) <= 6000 for value in params.values())
    assert from_params(dict(sorted(params.items(), reverse=True))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert check(parse(to_recipe(config), "file"), "file") == config
    assert check(to_tree(config), "tree") == config


def test_many_teachers_keep_their_order_in_parameters() -> None:
    twelve = {f"teachers.{i}.{key}": v for i in range(12) for key, v in (("weights", "w"), ("name", f"t{i}"))}
    config = load("digits_scalekd", twelve)
    assert [teacher.name for teacher in from_params(to_params(config)).teachers] == [f"t{i}" for i in range(12)]


def test_programs_may_lay_over_paths_and_numpy_numbers() -> None:
    import numpy as np

    config = load("digits_scalekd", {"teachers.0.weights": Path("a/b"), "seed": np.int64(3), "optim.lr": np.float64(1)})
    assert (config.teachers[0].weights, config.seed, config.optim.lr) == (Path("a/b"), 3, 1.0)
    with pytest.raises(ConfigError, match="a setting must be text, a number"):
        load("digits_scalekd", TEACHER | {"seed": object()})


# Mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"optim\.lrr: no such setting; did you mean 'lr'\?"),
        ("distill.pkdd.weight=1", r"distill\.pkdd: no such setting; did you mean 'pkd'\? \(known here: .*scalekd"),
        ("distill.scalekd.alfa=1", r"distill\.scalekd\.alfa: no such setting; did you mean 'alpha'"),
        ("distill.scalekd.csa.haeds=1", r"distill\.scalekd\.csa\.haeds: no such setting; did you mean 'heads'"),
        ("teachers.0.wights=1", r"teachers\.0\.wights: no such setting; did you mean 'weights'"),
        ("optim.lr=-1", r"optim: lr must be > 0, got -1"),
        ("optim.lr=NaN", r"optim\.lr: .*finite number"),
        ("optim.steps=2.5", r"optim\.steps: .*valid integer \(got 2\.5\)"),
        ("data.name=cocoo", r"data\.name: no such plug-in; did you mean 'coco'\?"),
        ("data={}", r"data\.name: required; one of .*coco"),
        ("student.name=fcoss", r"student\.name: .*'fcos'"),
        ("student.backbone.name=resnett", r"student\.backbone\.name: no such plug-in; did you mean 'resnet'"),
        ("student.backbone.nrm=1", r"student\.backbone\.nrm: no such setting; did you mean 'norm'"),
        ("student.backbone={}", r"student\.backbone\.name: required; one of .*resnet"),
        ("views.buckets=[[100,128]]", r"views: buckets must have sides that are multiples of 128"),
        ("evaluation.views.buckets=[[100,128]]", r"evaluation\.views: buckets must have sides"),
        ("evaluation.areas=[16,8]", r"evaluation: areas must be growing"),
        ("seed=x", r"seed: .*valid integer.*\(got 'x'\)"),
        ("seed=true", r"seed: .*valid integer.*\(got True\)"),
        ("seed=null", r"seed: required; add seed=\.\.\."),
        ("name=a/b", r"name: becomes a folder's name"),
        ("optim=3", r"optim: .*object \(got 3\)"),
        ("optim.lr.x=3", r"optim\.lr\.x: cannot set 'x' below the plain value 0\.01"),
        ("teachers.0.codec=int4", r"teachers\.0\.codec: .*'int8'.*\(got 'int4'\)"),
        ("teachers.0.tap_codecs.p9=fp16", r"teachers\.0\.tap_codecs\.p9.*'c5', 'p2'"),
        ("teachers.0.tap_codecs.p3=int4", r"teachers\.0\.tap_codecs\.p3: .*'int8'.*\(got 'int4'\)"),
        ("distill.fitnet.enlarged=0.5", r"distill\.fitnet: enlarged must be >= 1, got 0\.5"),
        ("teachers.2.weights=w", r"teachers\.2\.weights: '2' is no entry of a list of 1"),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_recipe(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        load_with(override)
    assert "pydantic" not in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teachers=[]"], r"distill: scalekd needs a teacher; add teachers\.0\.weights=\.\.\. or set distill=\{\}"),
        (["teachers.1.weights=w"], r"more than one is named 'teacher'"),
        (["teachers.0.name=a b"], r"teachers\.0\.name: becomes a part of file and metric names"),
        (["optim.batch=6", "order.lanes=4"], r"order\.lanes: 4 lanes must divide optim\.batch=6"),
        (["optim.batch=3", "resources.workers=4"], r"optim\.batch: 3 images cannot be shared by"),
        (["optim.batch=2", "optim.accumulate=3"], r"resources\.workers=1 x optim\.accumulate=3; take at least 3"),
        (["optim.ema=0.99", "resources.zero=3"], r"optim\.ema: cannot be kept at resources\.zero=3"),
        (["optim.warmup=2000"], r"optim\.warmup: 2000 steps do not fit"),
        (["seed=-1"], r"seed: must be >= 0"),
        (
            ["teachers.0.codec=sparse"],
            r"teachers\.0\.codec: sparse stores only what lies inside boxes, and scalekd reads the whole map; "
            r"set teachers\.0\.codec=int8$",
        ),
        (
            ["teachers.0.codec=sparse", 'distill={"fitnet": {}}'],
            r"and fitnet reads the whole map; set teachers\.0\.codec=int8 or distill\.fitnet\.foreground=true$",
        ),
        (
            ["teachers.0.tap_codecs.p4=sparse_position", "distill.fitnet.foreground=true", "distill.pkd={}"],
            r"teachers\.0\.tap_codecs\.p4: sparse_position .* pkd and scalekd read the .*\.p4=int8$",
        ),
        (["views.crop=[64,64]"], r"evaluation\.views: the evaluation view of crops"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_with(*overrides)


def test_a_cache_of_foreground_serves_methods_that_read_no_more() -> None:
    masked = 'distill={"fitnet": {"foreground": true}}'
    for settings in (["teachers.0.codec=sparse", masked], ["teachers.0.tap_codecs.p3=sparse_channel", masked]):
        assert load_with(*settings).teachers[0].cache
    live = load_with("teachers.0.codec=sparse", "teachers.0.cache=false")
    assert not live.teachers[0].cache, "what is not stored contradicts nothing"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="4 mistake") as told:
        load("digits_scalekd", from_arguments(["seed=x", "optim.lrr=1", "distill.pkdd={}"]))
    assert "teachers.0.weights: the recipe leaves this to you" in str(told.value)
    with pytest.raises(ConfigError, match="2 mistake"):
        load_with("seed=-1", "optim.warmup=2000")


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe file 'digit'.*digits_scalekd"):
        load("digit", {})


# What may stay empty


def test_plain_training_needs_no_teacher() -> None:
    config = load_with("distill={}", "teachers=[]")
    assert config.teachers == ()
    assert not config.distill


def test_evaluation_sees_the_whole_image_once_and_plainly() -> None:
    views = evaluation_views(load_with("views.short_side=[96, 128]", "views.count=3", "views.flip=0.5"))
    assert (views.count, views.short_side, views.flip, views.scale) == (1, (128,), 0.0, (1.0, 1.0))
    given = evaluation_views(load_with("evaluation.views.short_side=null", "evaluation.views.buckets=[[256, 256]]"))
    assert (given.count, given.short_side, given.flip, given.buckets) == (1, None, 0.0, ((256, 256),))


# Continuing a run


def test_only_settings_that_change_what_is_learnt_end_a_run() -> None:
    config = load_with()
    machines = load_with("resources.workers=2", "resources.zero=2", "storage=elsewhere", "tracking.uri=http://x")
    assert difference(config, machines) == []
    assert config_hash(config) == config_hash(machines)
    other = load_with("optim.lr=1", "resources.precision=bf16")
    assert difference(config, other) == ["optim.lr: 0.01 -> 1.0", "resources.precision: fp32 -> bf16"]
    assert config_hash(config) != config_hash(other)
    assert "distill.pkd.weight: not set -> 2.0" in difference(config, load_with("distill.pkd.weight=2"))


# Every plug-in and every recipe, today's and tomorrow's


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_is_valid(recipe: str) -> None:
    config = load(recipe, filled(recipe))
    assert config.name == recipe
    assert RECIPES[recipe].read_text().startswith("# ")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if filled(name)])
def test_a_recipe_says_what_it_leaves_to_the_user(recipe: str) -> None:
    with pytest.raises(ConfigError, match=f"{len(filled(recipe))} mistake") as told:
        load(recipe, {})
    assert all(f"{key}: the recipe leaves this to you: add {key}=..." in str(told.value) for key in filled(recipe))


@pytest.mark.parametrize(
    ("taught", "alone"),
    [("digits_scalekd", "digits_student")]
    + [(f"hit_uav_{method}", "hit_uav_student") for method in ("fitnet", "pkd", "scalekd")]
    + [("visdrone_scalekd", "visdrone_student"), ("voc_pkd", "voc_student")],
)
def test_a_method_is_compared_with_the_same_student(taught: str, alone: str) -> None:
    with_teacher, without = to_tree(load(taught, filled(taught))), to_tree(load(alone, filled(alone)))
    assert {key for key in without if with_teacher[key] != without[key]} == {"name", "teachers", "distill"}


@pytest.mark.parametrize("method", plugin_names("kd.methods"))
def test_every_method_is_a_recipe_setting(method: str) -> None:
    config = load_with(f'distill={{"{method}": {{"weight": 2}}}}')
    assert config.distill[method].weight == 2
    assert from_params(to_params(config)) == config


@pytest.mark.parametrize("detector", plugin_names("kd.detectors"))
@pytest.mark.parametrize("backbone", plugin_names("kd.backbones"))
def test_every_detector_takes_every_backbone_by_name(detector: str, backbone: str) -> None:
    tree = {"name": detector, "backbone": {"name": backbone}}
    config = load("digits_scalekd", {**TEACHER, "student": tree})
    assert type(config.student.backbone) is plugins("kd.backbones")[backbone].Config
    with pytest.raises(ConfigError, match=r"1 mistake.*\n  student\.backbone\.nrom: no such setting") as told:
        load("digits_scalekd", {**TEACHER, "student": tree, "student.backbone.nrom": 1})
    assert len(str(told.value).splitlines()) == 2


@pytest.mark.parametrize("package", ["kd.methods", "kd.detectors", "kd.backbones", "data_sharding.datasets"])
def test_every_plug_in_has_settings_that_cannot_change(package: str) -> None:
    for name, module in plugins(package).items():
        assert module.Config.__dataclass_params__.frozen, name
        assert all(setting.kw_only for setting in fields(module.Config)), name


# Speed


def test_checking_a_recipe_imports_no_cluster_library() -> None:
    code = (
        "import sys; from cluster.config import load; load('digits_student', {});"
        "heavy = {'ray', 'deepspeed', 'mlflow', 'optuna'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_lists_and_mappings_are_typed_as_a_recipe_has_them() -> None:
    typed = ["teachers.0.stores=[c5, pyramid]", "distill={fitnet: {share: 0.2}}", "views.buckets=[[64, 128], [1,1]]"]
    assert from_arguments(typed) == {
        "teachers.0.stores": ["c5", "pyramid"],
        "distill": {"fitnet": {"share": 0.2}},
        "views.buckets": [[64, 128], [1, 1]],
    }
    with pytest.raises(ConfigError, match=r"teachers.0.stores: begins as a list or a mapping and is none: '\[c5'"):
        from_arguments(["teachers.0.stores=[c5"])
    assert from_arguments(['name="[c5]"']) == {"name": "[c5]"}, "quoted, it is text"
