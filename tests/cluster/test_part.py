"""A recipe is checked without importing what its settings belong to, with the same result."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cluster import config
from cluster.config import check
from cluster.grammar import ConfigError, overlay, parse, recipes
from cluster.part import Part
from kd.plugins import plugin, plugin_names

FOLDERS = ("kd.methods", "kd.detectors", "kd.backbones", "data_sharding.datasets")
HEAVY = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "pyarrow", "scipy", "sklearn", "matplotlib", "pandas")
MISTAKES = {"optim.lrr": 1, "distill.scalekd.csa.heads": -1, "student.backbone.depth": 3, "views.flip": 2, "seed": "x"}


def alone(code: str, *arguments: str) -> str:
    """What a process of its own prints; it fails where something heavy was imported."""
    watch = f"\nfound = [name for name in {HEAVY} if name in sys.modules]\nassert not found, found"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code + watch, *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(tree: dict[str, object]) -> str:
    try:
        return config.to_recipe(check(tree, "recipe"))
    except ConfigError as error:
        return str(error)


def test_every_shipped_recipe_is_told_the_same_with_nothing_heavy_imported() -> None:
    code = """
import json
from cluster.grammar import ConfigError, overlay, parse, recipes
from cluster.part import Part
config, mistakes, said = Part("cluster.config"), json.loads(sys.argv[1]), {}
for name, path in recipes().items():
    for kind, laid in (("as it is", {}), ("wrong", mistakes)):
        try:
            tree = overlay(parse(path.read_text(), name), laid)
            said[f"{name} {kind}"] = config.to_recipe(config.check(tree, "recipe"))
        except ConfigError as error:
            said[f"{name} {kind}"] = str(error)
print(json.dumps(said))
"""
    said = json.loads(alone(code, json.dumps(MISTAKES)))
    trees = {name: parse(path.read_text(), name) for name, path in recipes().items()}
    assert said == {f"{name} as it is": told(tree) for name, tree in trees.items()} | {
        f"{name} wrong": told(overlay(tree, MISTAKES)) for name, tree in trees.items()
    }


def test_a_part_shares_its_classes_with_the_modules_beside_it() -> None:
    # In a process of its own: modules that are imported already, as any are among tests, are used as they are.
    code = """
from cluster.part import Part
settings = Part("cluster.config")
print(settings.beside("cluster.build").to_tree is settings.to_tree)
"""
    assert alone(code) == "True\n"


def test_the_settings_of_every_plugin_stand_alone() -> None:
    code = """
import json
from dataclasses import fields
from cluster.part import Part
from kd.plugins import plugin_names
known = {}
names = [f"{folder}.{name}" for folder in sys.argv[1:] for name in plugin_names(folder)]
print(json.dumps({name: [f.name for f in fields(Part(name, known).Config)] for name in names}))
"""
    found = json.loads(alone(code, *FOLDERS))
    assert found == {
        f"{folder}.{name}": [f.name for f in fields(plugin(folder, name).Config)]
        for folder in FOLDERS
        for name in plugin_names(folder)
    }


@pytest.mark.parametrize("arguments", [["digits_student", "optim.lrr=1"], ["digits_student", "--show"]])
def test_a_command_answers_with_nothing_heavy_imported(arguments: list[str]) -> None:
    code = "from cluster.command import command\nprint(command('train', 'Train.', print, sys.argv[1:]))"
    assert alone(code, *arguments).splitlines()[-1] == ("0" if "--show" in arguments else "2")


def test_a_part_runs_what_a_name_needs_in_the_files_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_settings.py").write_text(
        "import nothing_of_that_name\nfrom json import dumps, loads as read\n"
        "SIZES = (1, 2)\nLARGEST: int = max(SIZES)\n\n"
        "class First:\n    def second(self): return Second(), read(dumps(LARGEST))\n\n"
        "class Second(First):\n    pass\n\n"
        "class Heavy(nothing_of_that_name.Module):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    part = Part("some_settings")
    second, largest = part.First().second()
    assert (type(second), largest) == (part.Second, 2)
    assert "Heavy" not in vars(part)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        _ = part.Heavy
    with pytest.raises(AttributeError, match="module 'some_settings' has no 'Third'"):
        _ = part.Third


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"there is no module 'kd\.nothing'"):
        Part("kd.nothing")
