"""Do a method's tests notice when the method is broken? Each method is broken on purpose, in a copy of the sources:
the teacher's part is taken out, teacher and student change places, a mask is dropped; and at least one test of that
method must fail.

    python -m benchmarks.mutations --methods zoominnet,freekd
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision  # noqa: F401  (loaded once, before the forks that need it)

from benchmarks.mutation_list import every_mutation

ROOT = Path(__file__).parent.parent
SOURCES = ("kd", "data_sharding", "cluster", "tuning", "benchmarks", "tests")


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A change of a method's file, which its tests must not survive."""

    method: str
    what: str
    old: str
    new: str

    def applied(self, source: str) -> str:
        """The broken source; ValueError where the text to change is not there, or more than once."""
        if (count := source.count(self.old)) != 1:
            raise ValueError(
                f"mutation '{self.what}' of {self.method} changes a text that is there {count} times, not once: "
                f"{self.old!r}; bring benchmarks/mutation_list.py up to date"
            )
        return source.replace(self.old, self.new)


def main() -> None:
    """The command line: a table, and exit code 1 where a mutation survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", help="only these, with commas between")
    wanted = parser.parse_args().methods
    torch.set_num_threads(1)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in SOURCES:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        sound: set[str] = set()
        for mutation in mutations(wanted and wanted.split(",")):
            # Tests that fail anyway catch nothing.
            if mutation.method not in sound and outcome(mutation.method, copy) != pytest.ExitCode.OK:
                raise RuntimeError(f"the tests of {mutation.method} do not pass as it stands; mend them first")
            sound.add(mutation.method)
            caught = tried(mutation, copy)
            survived += not caught
            print(f"{mutation.method:12} {mutation.what:20} {'caught' if caught else 'SURVIVES'}", flush=True)
    sys.exit(1 if survived else 0)


def mutations(only: list[str] | None = None) -> Iterator[Mutation]:
    """All of them, or those of some methods."""
    for method, changes in every_mutation(ROOT).items():
        if only is None or method in only:
            for what, (old, new) in changes.items():
                yield Mutation(method=method, what=what, old=old, new=new)


def tried(mutation: Mutation, copy: Path) -> bool:
    """Whether a test of the method fails with the mutation; RuntimeError where the tests do not run at all."""
    path = copy / "kd" / "methods" / f"{mutation.method}.py"
    source = path.read_text()
    path.write_text(mutation.applied(source))
    try:
        code = outcome(mutation.method, copy)
    finally:
        path.write_text(source)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests of {mutation.method} did not run with '{mutation.what}': code {code}")
    return code == pytest.ExitCode.TESTS_FAILED


def outcome(method: str, copy: Path) -> int | None:
    """pytest's exit code of the method's tests on the copy as it stands."""
    child = multiprocessing.get_context("fork").Process(target=_test, args=(copy, method))
    child.start()
    child.join()
    return child.exitcode


def _test(copy: Path, method: str) -> None:
    """In a process of its own, which sees the copy alone."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(place for place in sys.path if Path(place or ".").resolve() != ROOT.resolve())]
    for name in [name for name in sys.modules if name.partition(".")[0] in SOURCES]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *_tests_of(method)])
    if code == pytest.ExitCode.OK:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "tests/kd/test_methods.py", "-k", method])
    os._exit(code)


def _tests_of(method: str) -> list[str]:
    """Its own file; for a method that has none, every file of tests that imports it."""
    folder = Path("tests") / "kd"
    if (folder / f"test_{method}.py").exists():
        return [str(folder / f"test_{method}.py")]
    imports = re.compile(rf"from kd\.methods import [^\n]*\b{method}\b|from kd\.methods\.{method} import")
    return sorted(str(path) for path in folder.glob("test_*.py") if imports.search(path.read_text()))


if __name__ == "__main__":
    main()
