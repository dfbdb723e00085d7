"""Nothing that is read from a checkpoint, a cache or a file of weights can run code."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster import fragments
from cluster.grammar import _RecipeLoader
from cluster.recovery import checkpoints
from data_sharding.world import World
from kd.distiller import Distiller
from kd.engine import PlainEngine
from tests.kd import runs
from tests.kd.runs import SGD

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_sharding", "kd", "cluster", "tuning")
UNPICKLERS = ("load", "loads", "Unpickler", "read_pickle")
PICKLES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pd", "pandas")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "gone off")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of a plain engine, and how to read it."""
    engine = PlainEngine(Distiller(runs.detector(0), {}), SGD)
    state: dict[str, Any] = {"engine": engine, "assistants": {}, "ema": None, "world": World(), "facts": {}}
    checkpoints.save(tmp_path / "checkpoint", step=1, **state)
    return tmp_path / "checkpoint", state


@pytest.mark.parametrize("name", ["plain_engine.pt", checkpoints.REST, "random_00000.pt"])
def test_a_checkpoint_that_holds_code_is_refused_and_the_code_not_run(
    saved: tuple[Path, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    folder, state = saved
    assert checkpoints.load(folder, **state) == (1, 1)
    assert (folder / name).exists()
    torch.save(Bomb(tmp_path / "crater"), folder / name)
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.load(folder, **state)
    assert not (tmp_path / "crater").exists()


def test_no_file_of_a_checkpoint_is_left_out_above(saved: tuple[Path, dict[str, Any]]) -> None:
    names = {"plain_engine.pt", checkpoints.REST, "random_00000.pt", checkpoints.FACTS}
    assert {path.name for path in saved[0].iterdir()} == names


def test_a_part_of_deepspeeds_state_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "crater"), tmp_path / "engine_00000.pt")
    with pytest.raises(pickle.UnpicklingError):
        fragments.Stored([tmp_path / "engine_00000.pt"])
    assert not (tmp_path / "crater").exists()


def test_the_bomb_works(tmp_path: Path) -> None:
    """Else the tests above could not fail."""
    torch.save(Bomb(tmp_path / "crater"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "crater").exists()


def test_no_line_of_ours_unpickles() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in _unpickling(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=flag)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", False),
        ("pickle.load(file)", True),
        ("pickle.Unpickler(file)", True),
        ("yaml.unsafe_load(text)", True),
        ("yaml.load(text, yaml.Loader)", True),
        ("yaml.load(text, _RecipeLoader)", False),
    ],
)
def test_what_counts_as_unpickling(line: str, bad: bool) -> None:
    assert bool(list(_unpickling(line))) is bad


def _unpickling(code: str) -> Iterator[int]:
    """Lines that could run what a file says."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loaders = [ast.unparse(argument) for argument in node.args[1:]] + [settings.get("Loader", "")]
        if (
            (owner == "torch" and name == "load" and settings.get("weights_only") != "True")
            or (owner in PICKLES and name in UNPICKLERS)
            or settings.get("allow_pickle", "False") != "False"
            or (owner == "yaml" and name in ("unsafe_load", "full_load"))
            or (owner == "yaml" and name == "load" and "_RecipeLoader" not in loaders)
        ):
            yield node.lineno


def test_recipes_are_read_by_a_safe_loader() -> None:

    assert issubclass(_RecipeLoader, yaml.SafeLoader)
