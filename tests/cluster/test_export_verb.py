"""The export verb: one file, checked, and a table of sizes and speeds."""

from pathlib import Path

import pytest
from PIL import Image

from cluster import export
from cluster.student import exporting
from cluster.student.command import command
from kd.evaluation.speed import Latency
from tests.kd.students import pictures, predictor, saved

FAST = ("compile=false", "repeats=1")


def run(*arguments: object) -> int:
    return command("export", "Write.", export.SETTINGS, export.act, [str(a) for a in arguments])


def test_the_file_lies_beside_the_student_and_the_tables_tell_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = saved(tmp_path / "student")
    assert run(student, *FAST, "image=[60,80]") == 0
    assert (student / "student.onnx").stat().st_size > 1000
    told = capsys.readouterr().out
    for words in ("eager", "ONNX Runtime", "parameters", "GFLOPs", "60 x 80", "96 x 128", "80 boxes in 2 image(s)"):
        assert words in told


def test_images_say_which_size_the_file_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for number, image in enumerate([*pictures(1, 50, 70), *pictures(1, 70, 50)]):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    student, out = saved(tmp_path / "student"), tmp_path / "camera.onnx"
    assert run(student, *files, *FAST, f"out={out}") == 2
    assert run(student, files[0], *FAST, "image=[51,70]", f"out={out}") == 2
    assert "name images of one size only" in capsys.readouterr().err
    assert not out.exists()
    assert run(student, files[0], *FAST, f"out={out}", "score=0.01") == 0
    assert "50 x 70" in capsys.readouterr().out


def test_without_a_compiler_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError

    def without(work: object, device: object, repeats: int) -> Latency:
        raise InductorError(RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ..."), None)  # pyright: ignore

    monkeypatch.setattr(exporting, "latency", without)
    row = exporting._compiled(predictor()[0], pictures(1, 60, 80)[0], repeats=1)
    assert "it needs a C++ compiler" in str(row["note"])
