"""Promises of bad input: all of it told in one message, or skipped and listed, and the same bytes whatever happens."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.command import for_people
from data_sharding import pack as packing
from data_sharding.pack import pack
from data_sharding.problems import REPORT, Problems, read_report, report
from data_sharding.shards import PackedDataset
from tests.data_sharding.formats import FORMATS, Format, as_coco, as_visdrone, expected, image_file, labels_of
from tests.data_sharding.packing import files

SHARD = 1500
"""Bytes: about one image."""


def _packed(data: Format, folder: Path) -> PackedDataset:
    return pack(data.config, data.module, "train", folder, SHARD)


def _spoil(data: Format) -> None:
    """One image cut, one gone."""
    (data.images / "b.jpg").write_bytes(image_file("b")[:-200])
    (data.images / "d.jpg").unlink()


def test_a_clean_split_leaves_an_empty_report(tmp_path: Path) -> None:
    dataset = _packed(as_coco(tmp_path / "data", "skip"), tmp_path / "packed")
    told = read_report(dataset.folder)
    assert (told["images_skipped"], told["annotations_skipped"], told["notes"]) == (0, 0, 0)
    assert told["problems"] == []


def test_stop_and_skip_give_the_same_bytes_of_clean_data(tmp_path: Path) -> None:
    packs = [_packed(as_coco(tmp_path / on_bad, on_bad), tmp_path / f"packed {on_bad}") for on_bad in ("stop", "skip")]
    assert packs[0].uid == packs[1].uid


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_skipped_is_listed_and_the_rest_is_kept(name: str, tmp_path: Path) -> None:
    data = FORMATS[name](tmp_path / "data", "skip")
    _spoil(data)
    dataset = _packed(data, tmp_path / "packed")
    assert labels_of([dataset.record(i) for i in range(len(dataset))]) == expected(without="b")
    told = read_report(dataset.folder)
    assert told["images_skipped"] == 2
    kinds = {Path(p["file"]).stem: p["kind"] for p in told["problems"]}
    assert kinds["b"] == "image file that cannot be decoded"
    assert "d" in kinds
    assert told["kinds"] == dict.fromkeys(kinds.values(), 1)


def test_stop_tells_every_undecodable_image_and_packs_nothing(tmp_path: Path) -> None:
    data = as_visdrone(tmp_path / "data", "stop")
    for stem in "ac":
        (data.images / f"{stem}.jpg").write_bytes(image_file(stem)[:-100])
    with pytest.raises(ValueError, match=r"2 x image file that cannot be decoded\n") as told:
        _packed(data, tmp_path / "packed")
    assert for_people(told.value)
    assert all(f"  {stem}.jpg (image file is truncated" in str(told.value) for stem in "ac")
    assert "data.on_bad=skip" in str(told.value)
    with pytest.raises(FileNotFoundError, match="no complete pack"):
        PackedDataset.open(tmp_path / "packed")


def test_a_repaired_image_continues_in_the_same_folder(tmp_path: Path) -> None:
    data = as_coco(tmp_path / "data", "stop")
    (data.images / "c.jpg").write_bytes(image_file("c")[:-100])
    with pytest.raises(ValueError, match="cannot be decoded"):
        _packed(data, tmp_path / "packed")
    (data.images / "c.jpg").write_bytes(image_file("c"))
    assert _packed(data, tmp_path / "packed").uid == _packed(data, tmp_path / "anew").uid
    assert files(tmp_path / "packed") == files(tmp_path / "anew")


def test_a_pack_with_gaps_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    data = as_coco(tmp_path / "data", "skip")
    (data.images / "c.jpg").write_bytes(image_file("c")[:-100])
    _packed(data, tmp_path / "packed")
    with pytest.raises(ValueError, match="on_bad was skip, is stop"):
        _packed(as_coco(tmp_path / "other", "stop"), tmp_path / "packed")


def test_a_split_of_nothing_but_bad_images_stops_even_when_skipping(tmp_path: Path) -> None:
    data = as_coco(tmp_path / "data", "skip")
    for stem in "abcd":
        (data.images / f"{stem}.jpg").write_bytes(image_file(stem)[:-100])
    with pytest.raises(ValueError, match="none of the 4 images can be decoded") as told:
        _packed(data, tmp_path / "packed")
    assert for_people(told.value)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("name", FORMATS)
def test_a_skipping_pack_killed_at_every_write_ends_with_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FORMATS[name](tmp_path / "data", "skip")
    _spoil(data)
    whole = files(_packed(data, tmp_path / "whole").folder)
    assert sum(file.endswith(".arrow") for file in whole) >= 3
    real = packing.write_atomically
    for after in (False, True):
        kills = 0
        while kills < 50:
            folder = tmp_path / f"killed {after} {kills}"
            left = kills

            def write(path: Path, content: Any, left: list[int] = [left], after: bool = after) -> None:  # noqa: B006
                left[0] -= 1
                if left[0] == -1 and not after:
                    raise _Killed
                real(path, content)
                if left[0] == -1:
                    raise _Killed

            monkeypatch.setattr(packing, "write_atomically", write)
            try:
                _packed(data, folder)
                break
            except _Killed:
                kills += 1
            finally:
                monkeypatch.setattr(packing, "write_atomically", real)
            _packed(data, folder)
            assert files(folder) == whole
        assert 8 <= kills < 50


def test_duplicates_cost_what_is_not_clear(tmp_path: Path) -> None:
    data = as_coco(tmp_path, "skip")
    content = json.loads(data.labels.read_text())
    first, second, third, fourth = content["images"]
    content["images"] += [dict(first), {**second, "file_name": "none.jpg"}, {**third, "id": 99}]
    content["annotations"].append(dict(content["annotations"][0]))
    data.labels.write_text(json.dumps(content))
    source = data.module.source(data.config, "train")
    # An equal repeat costs nothing else; of two files with one id nobody knows whose labels these are; one file is one.
    assert [r.file_name for r in source] == ["a.jpg", "c.jpg", "d.jpg"]
    assert labels_of(list(source)) == expected(without="b")
    kinds = [p.kind for p in source.problems.found]
    assert sorted(kinds) == [
        "duplicate id in annotations",
        *["duplicate id in images"] * 3,
        "two images of one name",
    ]
    assert fourth["id"] == 13


def test_a_box_over_the_edge_is_used_and_noted(tmp_path: Path) -> None:
    data = as_coco(tmp_path, "stop")
    content = json.loads(data.labels.read_text())
    content["annotations"][0]["bbox"] = [-5, 4, 10, 100]
    data.labels.write_text(json.dumps(content))
    source = data.module.source(data.config, "train")
    assert source.read(0).boxes[0].tolist() == [0, 4, 5, 40]
    (note,) = source.problems.found
    assert (note.costs, note.file, note.annotation) == ("nothing", "a.jpg", "1000")


def test_a_damaged_report_is_told_and_made_again(tmp_path: Path) -> None:
    data = as_coco(tmp_path / "data", "skip")
    folder = _packed(data, tmp_path / "packed").folder
    (folder / REPORT).write_text("{")
    with pytest.raises(ValueError, match=r"problems\.json cannot be read .* pack again"):
        read_report(folder)
    _packed(data, folder)
    assert read_report(folder)["problems"] == []


def test_the_report_is_json_with_a_line_per_problem() -> None:
    problems = Problems("somewhere", "skip")
    problems.image("gone", 'a "b".jpg')
    problems.annotation("empty", "a.jpg", 7, "0,0")
    problems.note("odd", "a.jpg", 8)
    assert not problems.stopping
    text = report("val", "skip", problems.found)
    told = json.loads(text)
    assert told["kinds"] == {"gone": 1, "empty": 1, "odd": 1}
    assert sum(b'"costs"' in line for line in text.splitlines()) == 3
    problems.split("no categories", "labels.json")
    with pytest.raises(ValueError, match="1 x gone; 1 x empty; 1 x no categories") as stopped:
        problems.stop_if_any()
    assert "on_bad" not in str(stopped.value)
