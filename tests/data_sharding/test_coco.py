"""Promises of the COCO reader: every label arrives as it was meant, and unusable files are refused in one message."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_sharding.datasets import coco
from data_sharding.images import decode
from data_sharding.record import Category

DATA = Path(__file__).parents[2] / "../shared/data"
needs_tinycoco = pytest.mark.skipif(not (DATA / "coco").is_dir(), reason="../shared/data/coco is not on this machine")
needs_hit_uav = pytest.mark.skipif(
    not (DATA / "hit_uav").is_dir(), reason="../shared/data/hit_uav is not on this machine"
)

Content = dict[str, Any]


def _content() -> Content:
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "sub/b.png", "width": 30, "height": 40},
            {"id": 9, "file_name": "empty.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "unclear"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 2, 10.5, 20], "area": 99.5, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [-5, 20, 20, 20], "iscrowd": 1},
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [30, 0, 15, 5]},
            {"id": 4, "image_id": 5, "category_id": 3, "bbox": [0, 0, 4, 4], "ignore": 1},
            {"id": 6, "image_id": 2, "category_id": 3, "bbox": [0, 0, 30, 40], "ignore": 0},
        ],
    }


def _config(folder: Path, content: Content | None = None) -> coco.Config:
    (folder / "images/sub").mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, rotated in (("a.png", None), ("sub/b.png", exif), ("empty.png", None)):
        Image.new("RGB", (40, 30)).save(folder / "images" / name, exif=rotated)
    labels = folder / "labels.json"
    labels.write_text(json.dumps(_content() if content is None else content))
    split = coco.Split(images=folder / "images", annotations=labels)
    return coco.Config(train=split, ignore_categories=("unclear",))


def test_images_without_objects_are_kept(tmp_path: Path) -> None:
    empty = list(coco.records(_config(tmp_path), "train"))[2]
    assert (empty.image_id, empty.file_name) == (9, "empty.png")
    assert (empty.boxes.shape, empty.labels.shape, empty.ignore_regions.shape) == ((0, 4), (0,), (0, 4))


def test_labels_arrive_as_they_were_meant(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert coco.categories(config) == (Category(3, "cat"), Category(7, "dog"))
    first, second, _ = coco.records(config, "train")
    assert first.boxes.tolist() == [[1, 2, 11.5, 22], [0, 20, 15, 30]]
    assert first.boxes.dtype == np.float32
    assert first.labels.tolist() == [1, 0]
    assert first.annotation_ids.tolist() == [1, 2]
    assert first.areas.tolist() == [99.5, 150.0]
    assert first.crowd.tolist() == [False, True]
    assert first.ignore_regions.tolist() == [[30, 0, 40, 5], [0, 0, 4, 4]]
    assert (first.segmentations, first.keypoints) == ((), None)
    assert (second.width, second.height) == (30, 40)
    assert decode(second.image).shape == (3, 40, 30)


def test_segmentations_and_keypoints_are_kept_object_by_object(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0] |= {"segmentation": [[1, 2, 3.5, 4, 5, 6]], "keypoints": [1, 2, 2, 0, 0, 0]}
    first, second, empty = coco.records(_config(tmp_path, content), "train")
    assert first.segmentations == ("[[1,2,3.5,4,5,6]]", "[]")
    assert first.keypoints is not None
    assert first.keypoints.tolist() == [[[1, 2, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
    assert second.segmentations == ("[]",)
    assert empty.keypoints is not None
    assert empty.keypoints.shape == (0, 2, 3)


def _set(kind: str, position: int, **changes: object) -> Callable[[Content], None]:
    return lambda content: content[kind][position].update(changes)


def _drop(kind: str) -> Callable[[Content], None]:
    return lambda content: content.pop(kind)


def _twice(kind: str) -> Callable[[Content], None]:
    return lambda content: content[kind].append(dict(content[kind][0]))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_set("images", 0, file_name="none.png"), r"1 x missing image file in .*none\.png"),
        (_set("images", 0, file_name="../labels.json"), r"1 x file name that leaves the image folder"),
        (_set("images", 0, file_name="/etc/hosts"), r"1 x file name that leaves the image folder"),
        (_set("images", 0, file_name="..\\a.png"), r"1 x file name that leaves the image folder"),
        (_set("images", 0, width=41), r"1 x image of another size.*a\.png \(40 x 30 px upright, labelled 41 x 30\)"),
        (_set("images", 1, width=40, height=30), r"1 x image of another size.*b\.png \(30 x 40 px upright"),
        (_set("images", 0, id="5"), r"images entry without a valid id.*images\[0\]"),
        (_set("annotations", 0, image_id=77), r"1 x unknown image id.*image id 77 annotation 1"),
        (_set("annotations", 0, category_id=77), r"1 x unknown category id.*a\.png annotation 1"),
        (_set("annotations", 0, bbox=[float("nan"), 0, 1, 1]), r"1 x box that is not four finite numbers"),
        (_set("annotations", 0, bbox=[0, 0, float("inf"), 1]), r"1 x box that is not four finite numbers"),
        (_set("annotations", 0, bbox=[0, 0, 1]), r"1 x box that is not four finite numbers"),
        (_set("annotations", 0, bbox=["0", 0, 1, 1]), r"1 x box that is not four finite numbers"),
        (_set("annotations", 0, bbox=[5, 5, -1, 1]), r"1 x reversed box"),
        (_set("annotations", 0, bbox=[5, 5, 0, 1]), r"1 x box without area"),
        (_set("annotations", 0, bbox=[40, 5, 3, 3]), r"1 x box outside the image"),
        (_set("annotations", 0, bbox=[-4, 5, 3, 3]), r"1 x box outside the image"),
        (_set("annotations", 0, bbox=None), r"annotations entry without a valid bbox.*annotations\[0\]"),
        (_set("annotations", 0, area=float("nan")), r"1 x area that is not a number"),
        (_set("annotations", 0, keypoints=[1, 2]), r"1 x unusable keypoints"),
        (_twice("images"), r"1 x duplicate id in images.*id 5"),
        (_twice("annotations"), r"1 x duplicate id in annotations.*annotation 1:"),
        (_twice("categories"), r"1 x duplicate id in categories.*id 7"),
        (_drop("annotations"), r"is not COCO: expected an object with the lists.*\['categories', 'images'\]"),
        (lambda c: c.update(images=[], annotations=[]), r"1 x split without images"),
    ],
)
def test_unusable_content_is_refused_with_its_kind_and_place(
    tmp_path: Path, spoil: Callable[[Content], None], told: str
) -> None:
    content = _content()
    spoil(content)
    config = _config(tmp_path, content)
    with pytest.raises(ValueError, match=rf"(?s)labels\.json.*{told}"):
        coco.source(config, "train")


def test_everything_wrong_is_told_in_one_message_with_ten_places(tmp_path: Path) -> None:
    content = _content()
    content["images"][2]["file_name"] = "none.png"
    for i in range(12):
        bad = {"id": 100 + i, "image_id": 5, "category_id": 3, "bbox": [0, 0, -1, 1]}
        content["annotations"].append(bad)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        coco.source(_config(tmp_path, content), "train")
    lines = str(caught.value).splitlines()
    assert "1 x missing image file" in lines[0]
    assert "12 x reversed box (negative width or height)" in lines[0]
    assert len(lines) == 1 + 10 + 1 + 1
    assert lines[2] == "  a.png annotation 100: reversed box (negative width or height)"
    assert lines[-2] == "  and 3 more"
    assert "data.on_bad=skip" in lines[-1]


def test_a_file_that_is_no_image_is_told(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (tmp_path / "images/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)1 x image file that cannot be read.*a\.png"):
        coco.source(config, "train")


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_not_a_coco_file_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    config = _config(tmp_path)
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.json is not (JSON|COCO)"):
        coco.categories(config)


def test_splits_that_are_not_there_are_told(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(ValueError, match="no split 'val'; configured: train"):
        coco.source(config, "val")
    with pytest.raises(ValueError, match="no split 'name'"):
        coco.source(config, "name")
    with pytest.raises(ValueError, match="none of train, val, test is set"):
        coco.categories(coco.Config())
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match=r"labels\.json: no such file"):
        coco.source(config, "train")


def test_an_unknown_ignored_category_is_told(tmp_path: Path) -> None:
    config = replace(_config(tmp_path), ignore_categories=("unclaer",))
    with pytest.raises(ValueError, match=r"ignore_categories \['unclaer'\].*unclear"):
        coco.categories(config)


def test_splits_must_name_the_same_categories(tmp_path: Path) -> None:
    content = _content()
    content["categories"][0]["name"] = "wolf"
    train, val = _config(tmp_path / "a"), _config(tmp_path / "b", content)
    with pytest.raises(ValueError, match="other categories than the first split"):
        coco.source(replace(train, val=val.train), "val")


def test_the_fingerprint_is_of_the_labels_not_of_the_place(tmp_path: Path) -> None:
    first, moved = (coco.source(_config(tmp_path / x), "train").fingerprint for x in "ab")
    assert first == moved
    content = _content()
    content["annotations"][0]["bbox"][0] += 1
    assert coco.source(_config(tmp_path / "c", content), "train").fingerprint != first
    config = _config(tmp_path / "d")
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "d/images/a.png", compress_level=0)
    assert coco.source(config, "train").fingerprint != first


def _tinycoco(folder: str = "tinycoco", labels: str = "instances") -> coco.Config:
    def split(name: str) -> coco.Split:
        root = DATA / "coco" / folder
        return coco.Split(
            images=root / f"images/{name}2017", annotations=root / f"annotations/{labels}_{name}2017.json"
        )

    return coco.Config(train=split("train"), val=split("val"))


@needs_tinycoco
def test_tinycoco_is_read_whole() -> None:
    config = _tinycoco()
    assert len(coco.categories(config)) == 80
    records = list(coco.records(config, "train"))
    assert len(records) == 32
    assert sum(len(r.boxes) for r in records) == 288
    assert sum(int(r.crowd.sum()) for r in records) == 4
    assert all(len(r.segmentations) == len(r.boxes) for r in records)
    assert sum(not len(r.boxes) for r in records) == 2
    assert coco.source(config, "val").count == 6
    for record in records[:5]:
        assert decode(record.image, record.file_name).shape == (3, record.height, record.width)


@needs_tinycoco
def test_pose_minicoco_keeps_its_keypoints() -> None:
    records = list(coco.records(_tinycoco("pose_minicoco", "person_keypoints"), "val"))
    assert len(records) == 30
    points = [r.keypoints for r in records if r.keypoints is not None]
    assert len(points) == 30
    assert sum(len(p) for p in points) == 65
    assert {p.shape[1:] for p in points} == {(17, 3)}


@needs_hit_uav
def test_hit_uav_dont_care_becomes_regions() -> None:
    def split(name: str) -> coco.Split:
        root = DATA / "hit_uav"
        return coco.Split(images=root / f"normal_json/{name}", annotations=root / f"coco/instances_{name}.json")

    config = coco.Config(train=split("train"), val=split("val"), ignore_categories=("DontCare",))
    assert [c.name for c in coco.categories(config)] == ["Person", "Car", "Bicycle", "OtherVehicle"]
    records = list(coco.records(config, "val"))
    assert len(records) == 145
    assert sum(len(r.boxes) for r in records) == 1214
    assert sum(len(r.ignore_regions) for r in records) == 5


@needs_hit_uav
def test_hit_uavs_native_json_is_refused_with_the_command_that_rewrites_it(tmp_path: Path) -> None:
    root = DATA / "hit_uav/normal_json"
    config = coco.Config(train=coco.Split(images=root / "train", annotations=root / "annotations/train.json"))
    with pytest.raises(ValueError, match=r"is not COCO: .*'annotation'.*HIT-UAV's native layout") as told:
        coco.source(config, "train")
    command = next(line for line in str(told.value).splitlines() if line.strip().startswith("python -c"))
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:-1], str(tmp_path / words[-1])], check=True)
    rewritten = coco.Split(images=root / "train", annotations=tmp_path / "instances.json")
    source = coco.source(coco.Config(train=rewritten, ignore_categories=("DontCare",)), "train")
    assert (source.count, source.problems.found) == (677, [])
