"""docs/methods.md says what the methods' files say."""

from pathlib import Path

from kd import describe
from kd.plugins import plugin_names

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_is_what_the_files_make() -> None:
    assert PAGE.read_text() == describe.text(), "docs/methods.md has drifted: run `make docs`"


def test_every_method_has_a_source_and_every_setting_a_line() -> None:
    text = describe.text()
    for name in plugin_names("kd.methods"):
        assert f"\n## {name}\n" in text
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [{name}](")]
        assert row.split("|")[2].strip(), f"kd/methods/{name}.py: the docstring names no paper in brackets"
    for line in ("| `sdf.on` | `c5` | c5 \\| pyramid |", "| `csa.rates` | `[[16, 8], [8, 4]", "| `alpha` | `null` |"):
        assert line in text
