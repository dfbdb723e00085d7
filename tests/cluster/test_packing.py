"""What a person is told of bad input by the command that packs; runs that begin together share their data."""

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from cluster import packing
from cluster.build import split_folder
from cluster.config import RunConfig, load
from tests.cluster.test_scoring import recipe
from tests.data_sharding.formats import as_coco, as_visdrone


def _recipe(folder: Path, **more: object) -> RunConfig:
    for split in ("train", "val"):
        as_visdrone(folder / split, "skip")
    paths = {"data.train": str(folder / "train"), "data.val": str(folder / "val"), "storage": str(folder / "runs")}
    return load("visdrone_student", {"student.backbone.weights": None, **paths, **more})


def test_clean_data_has_one_table_only(tmp_path: Path) -> None:
    packed = packing.pack_splits(_recipe(tmp_path))
    assert [(row["images"], row["objects"], row["images left out"]) for row in packing.summary(packed)] == [
        (4, 5, 0)
    ] * 2
    assert packing.irregular(packed) == []


def test_the_tables_count_what_was_left_out_and_say_where_it_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _recipe(tmp_path)
    (tmp_path / "train/annotations/a.txt").write_text("1,1,0,5,1,4,0,0\n1,1,5,5,1,4,0,0,\n")
    (tmp_path / "train/images/b.jpg").write_bytes(b"no image")
    packed = packing.pack_splits(config)
    row = packing.summary(packed)[0]
    assert (row["images"], row["images left out"], row["labels left out"]) == (3, 1, 1)
    found = {r["found"]: (r["count"], r["left out"]) for r in packing.irregular(packed)}
    assert found == {
        "trailing comma": (1, "-"),
        "box without area": (1, "the annotation"),
        "image file that cannot be read": (1, "the image"),
    }
    where = packing.irregular(packed)[0]["listed in"]
    assert json.loads(Path(str(where)).read_text())["images_skipped"] == 1
    said = capsys.readouterr().err
    assert f"pack train: 1 image(s) and 1 annotation(s) left out, listed in {where}" in said
    assert "pack val: 1 image" not in said


def test_stopping_is_the_default_of_a_data_set(tmp_path: Path) -> None:
    data = as_coco(tmp_path / "data", "stop")
    (data.images / "a.jpg").unlink()
    split = {"images": str(data.images), "annotations": str(data.labels)}
    keys = {"data.train": split, "data.val": split, "storage": str(tmp_path / "runs"), "student.backbone.weights": None}
    config = load("hit_uav_student", keys | {"data.ignore_categories": []})
    with pytest.raises(ValueError, match=r"1 x missing image file .*\n  a\.jpg: missing"):
        packing.pack_splits(config)


def test_a_run_waits_for_another_one_that_packs_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    waiting = threading.Event()

    def say(text: str) -> None:
        told.append(text)
        waiting.set()

    monkeypatch.setattr(packing, "PATIENCE", 0.01)
    monkeypatch.setattr(packing, "say", say)
    config = recipe(tmp_path)
    folder = split_folder(config, "train")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)

    def let_go() -> None:
        waiting.wait(60)
        os.close(held)

    other = threading.Thread(target=let_go)
    other.start()
    packed = packing.pack_splits(config)
    other.join()
    assert len(packed["train"]) == 8
    assert [text for text in told if "another process is packing into" in text and "waiting for it" in text] == told[:1]
