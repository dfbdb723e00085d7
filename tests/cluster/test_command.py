"""Commands answer at once, tell users what to put right, and keep the traceback of a bug."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.command import command
from cluster.config import RunConfig, check
from cluster.grammar import parse, recipes
from cluster.terminal import progress, table


def run(act: object, *arguments: str) -> int:
    return command("train", "Train a student.", act, arguments)  # pyright: ignore[reportArgumentType]


def nothing(config: RunConfig) -> None:
    del config


def test_a_verb_gets_the_checked_recipe() -> None:
    seen: list[RunConfig] = []
    assert run(seen.append, "digits_student", "optim.lr=2e-4", "name=second") == 0
    assert (seen[0].name, seen[0].optim.lr) == ("second", 2e-4)


def test_a_recipe_may_be_a_path(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(recipes()["digits_student"].read_text())
    seen: list[RunConfig] = []
    assert run(seen.append, str(copy)) == 0
    assert seen[0].name == "digits_student"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_show_prints_a_recipe_that_reads_back(capsys: pytest.CaptureFixture[str], place: int) -> None:
    seen: list[RunConfig] = []
    words = ["digits_student", "seed=5"]
    words.insert(place, "--show")
    assert run(seen.append, *words) == 0
    assert not seen
    assert check(parse(capsys.readouterr().out, "shown"), "shown").seed == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing_of_that_name"], "no recipe file 'nothing_of_that_name'"),
        (["digits_student", "optim.lr"], "expected dotted.key=value"),
        (["digits_student", "optim.lrr=1"], "did you mean 'lr'?"),
        (["digits_scalekd"], "add teachers.0.weights=..."),
    ],
)
def test_a_users_mistake_is_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(nothing, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_our_own_value_error_is_for_people_too(capsys: pytest.CaptureFixture[str]) -> None:
    from kd.plugins import plugin

    def act(config: RunConfig) -> None:
        plugin("kd.methods", config.name)

    assert run(act, "digits_student") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(act, "digits_student", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_file_is_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda config: (tmp_path / "weights").read_bytes(), "digits_student") == 2
    told = capsys.readouterr().err
    assert "No such file" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("bug", [lambda c: 1 / 0, lambda c: int("x"), lambda c: [].remove(1), lambda c: {}["a"]])
def test_a_bug_keeps_its_traceback(bug: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bug, "digits_student") == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_told_shortly(capsys: pytest.CaptureFixture[str]) -> None:
    def act(config: RunConfig) -> None:
        raise KeyboardInterrupt

    assert run(act, "digits_student") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_explains_lists_the_recipes_and_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from cluster.command import command\n"
        "try: command('train', 'Train a student.', print, ['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'pydantic', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "python -m cluster.train digits_student" in done.stdout
    assert all(name in done.stdout for name in recipes())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_outside_a_terminal_is_plain_lines() -> None:
    out = io.StringIO()
    with progress("packing train", every=1000, stream=out) as report:
        for done in range(5):
            report(done, 4, note="of hit_uav")
    assert out.getvalue().splitlines() == [line for line in out.getvalue().splitlines() if "packing train: 4/4" in line]
    assert "(100 %)" in out.getvalue()
    assert out.getvalue().endswith("of hit_uav\n")


def test_progress_that_stops_early_tells_how_far_it_came() -> None:
    out = io.StringIO()

    def stop() -> None:
        with progress("training", every=1000, stream=out) as report:
            report(3, 10)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    assert "training: 3/10 (30 %)" in out.getvalue()


def test_progress_without_news_or_total_says_nothing_wrong() -> None:
    out = io.StringIO()
    with progress("nothing", stream=out):
        pass
    assert out.getvalue() == ""
    with progress("empty", stream=out) as report:
        report(0, 0)
    assert "empty: 0/0" in out.getvalue()


def test_progress_in_a_terminal_is_a_bar() -> None:
    out = Terminal()
    with progress("training", stream=out) as report:
        report(5, 10, note="loss 1.2")
    assert "5/10" in out.getvalue()
    assert "loss 1.2" in out.getvalue()


def test_a_table_shows_every_cell_in_one_line_per_row() -> None:
    out = io.StringIO()
    table("results", [{"run": "student", "AP": 0.123456, "steps": 10}, {"run": "scalekd", "AP": None}], stream=out)
    lines = out.getvalue().splitlines()
    assert any("student" in line and "0.1235" in line and "10" in line for line in lines)
    assert any("scalekd" in line and "-" in line for line in lines)
    table("nothing", [], stream=io.StringIO())
