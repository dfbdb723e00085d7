"""Promises of the Pascal VOC reader: boxes where VOC's pixels are, flags kept, and no trust in a stranger's XML."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_sharding.datasets import voc
from data_sharding.datasets._voc_xml import parse
from data_sharding.views import ViewConfig, draw, place_labels

BOMB = """<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a "xxxxxxxxxx">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;"><!ENTITY d "&c;&c;&c;&c;&c;&c;&c;&c;">]>
<annotation><object><name>&d;</name></object></annotation>"""


def _object(name: str = "dog", box: tuple[object, ...] = (1, 2, 10, 20), difficult: str = "0") -> str:
    corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def _config(folder: Path, objects: str = "", size: str = "<width>40</width><height>30</height>") -> voc.Config:
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", (40, 30)).save(folder / f"JPEGImages/{name}.jpg")
        inside = objects if name == "a" else ""
        xml = f"<annotation><size>{size}</size>{inside}</annotation>"
        (folder / f"Annotations/{name}.xml").write_text(xml)
    (folder / "ImageSets/Main/train.txt").write_text("b\na\n")
    return voc.Config(train=(voc.Part(folder=folder, list="train"),), classes=("cat", "dog"))


def test_images_without_objects_are_kept_in_the_lists_order(tmp_path: Path) -> None:
    first, second = voc.records(_config(tmp_path, _object()), "train")
    assert (first.file_name, first.image_id, first.boxes.shape) == ("b.jpg", 1, (0, 4))
    assert (second.file_name, second.image_id, second.annotation_ids.tolist()) == ("a.jpg", 2, [1])


def test_vocs_pixels_count_from_one_and_include_the_last(tmp_path: Path) -> None:
    config = _config(tmp_path, _object(box=(1, 2, 40, 30)) + _object("cat", (5, 5, 5, 5)))
    record = list(voc.records(config, "train"))[1]
    assert record.boxes.tolist() == [[0, 1, 40, 30], [4, 4, 5, 5]]
    assert record.labels.tolist() == [1, 0]
    from_zero = replace(_config(tmp_path, _object(box=(0, 2, 40, 30))), first_pixel=0)
    assert list(voc.records(from_zero, "train"))[1].boxes.tolist() == [[0, 2, 40, 30]]


def test_a_file_that_counts_from_zero_is_noted_with_what_to_set(tmp_path: Path) -> None:
    source = voc.source(_config(tmp_path, _object(box=(0, 2, 40, 30)) + _object(box=(3, 3, 50, 9))), "train")
    kinds = [(p.costs, p.kind) for p in source.problems.found]
    assert [costs for costs, _ in kinds] == ["nothing", "nothing"]
    assert "data.first_pixel=0" in kinds[0][1]
    assert kinds[1][1].startswith("box reaching out of the image")
    assert source.read(1).boxes.tolist() == [[0, 1, 40, 30], [2, 2, 40, 9]]


def test_difficult_objects_are_not_learnt_and_nothing_is_learnt_of_their_place(tmp_path: Path) -> None:
    config = _config(tmp_path, _object() + _object("cat", (20, 5, 30, 15), "1"))
    record = list(voc.records(config, "train"))[1]
    assert record.difficult.tolist() == [False, True]
    plain = ViewConfig(flip=0.0, short_side=None, buckets=((128, 128),))
    view = draw(plain, "a data set", 1, 40, 30, np.zeros((0, 4)), 0)
    boxes, labels, ignore = place_labels(record, view, min_visible=0.25)
    assert (boxes.tolist(), labels.tolist()) == ([[0, 1, 10, 20]], [1])
    assert ignore.tolist() == [[19, 4, 30, 15]]


def test_classes_are_found_in_all_splits_and_sorted(tmp_path: Path) -> None:
    train = _config(tmp_path / "a", _object("zebra") + _object("DontCare"))
    val = _config(tmp_path / "b", _object("ant"))
    config = replace(train, val=val.train, classes=(), ignore_classes=("DontCare",))
    assert [(c.id, c.name) for c in voc.categories(config)] == [(1, "ant"), (2, "zebra")]
    record = list(voc.records(config, "train"))[1]
    assert (record.labels.tolist(), len(record.ignore_regions)) == ([1], 1)
    with pytest.raises(ValueError, match="no class is named"):
        voc.categories(replace(_config(tmp_path / "c"), classes=()))
    with pytest.raises(ValueError, match="must stand once"):
        voc.categories(replace(config, classes=("ant", "ant")))


@pytest.mark.parametrize(
    ("objects", "told"),
    [
        (_object("wolf"), r"1 x unknown class name.*a\.jpg annotation object 1 \(wolf\)"),
        (_object(box=(9, 2, 3, 20)), "1 x reversed box"),
        (_object(box=("nan", 2, 3, 20)), "1 x box that is not four finite numbers"),
        (_object(box=(41, 2, 50, 20)), "1 x box outside the image"),
        (_object(difficult="yes"), "1 x difficult that is neither 0 nor 1"),
        ("<object><name>dog</name></object>", "1 x object without one name and one box"),
    ],
)
def test_unusable_objects_are_told(tmp_path: Path, objects: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){told}"):
        voc.source(_config(tmp_path, objects), "train")


def test_lists_that_cannot_be_followed_are_told(tmp_path: Path) -> None:
    config = _config(tmp_path)
    lists = tmp_path / "ImageSets/Main/train.txt"
    lists.write_text("a\nb 1\n../a\na\nnone\n")
    kinds = "1 x file name that leaves the image folder; 1 x two images of one name; 1 x missing annotation file"
    with pytest.raises(ValueError, match=kinds):
        voc.source(config, "train")
    skipping = voc.source(replace(config, on_bad="skip"), "train")
    assert [r.image_id for r in skipping] == [1, 2]
    assert [p.kind for p in skipping.problems.found if p.costs == "nothing"] == ["second word in the list (not used)"]
    lists.write_text("\n")
    with pytest.raises(ValueError, match="split without usable images"):
        voc.source(config, "train")
    lists.unlink()
    with pytest.raises(ValueError, match=r"train\.txt: no such list"):
        voc.source(config, "train")


def test_an_image_of_another_size_is_refused_and_a_missing_size_noted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 x image of another size than its label says"):
        voc.source(_config(tmp_path, size="<width>30</width><height>40</height>"), "train")
    source = voc.source(_config(tmp_path, size="<width>0</width>"), "train")
    assert len(source.problems.found) == 2
    assert (source.read(0).width, source.read(0).height) == (40, 30)


@pytest.mark.parametrize("xml", [BOMB, BOMB.replace("annotation [", "annotation SYSTEM 'x.dtd' [")])
def test_document_types_are_refused_before_entities_unfold(xml: str) -> None:
    with pytest.raises(ValueError, match="declares a document type"):
        parse(xml.encode())
    with pytest.raises(ValueError, match="declares a document type"):
        parse(xml.replace('version="1.0"', 'version="1.0" encoding="utf-16"').encode("utf-16"))


@pytest.mark.parametrize("xml", ["", "<annotation>", "<html/>", "no xml", '<?xml version="1.0" encoding="x"?><a/>'])
def test_what_is_not_vocs_xml_is_refused(xml: str) -> None:
    with pytest.raises(ValueError, match=r"not XML|not VOC's XML"):
        parse(xml.encode())


def test_voc100_is_read_whole(shared_data: Path) -> None:
    part = voc.Part(folder=shared_data / "voc/VOC100", list="test")
    config = voc.Config(val=(part,))
    assert len(voc.categories(config)) == 20
    source = voc.source(config, "val")
    records = list(source)
    assert (len(records), sum(len(r.boxes) for r in records)) == (100, 273)
    assert sum(int(r.difficult.sum()) for r in records) == 38
    assert not source.problems.found
    first = records[0]
    assert (first.file_name, first.boxes.tolist()) == ("2007_000027.jpg", [[173, 100, 349, 351]])


def test_hit_uav_reads_the_same_as_xml_and_as_json(shared_data: Path) -> None:
    from data_sharding.datasets import coco

    root = shared_data / "hit_uav"
    part = voc.Part(folder=root / "normal_xml", list="val", images=root / "normal_json/val")
    named = ("Person", "Car", "Bicycle", "OtherVehicle")
    config = voc.Config(val=(part,), classes=named, ignore_classes=("DontCare",), first_pixel=0)
    split = coco.Split(images=root / "normal_json/val", annotations=root / "coco/instances_val.json")
    other = coco.Config(val=split, ignore_categories=("DontCare",))
    by_name = {r.file_name: r for r in coco.records(other, "val")}
    for record in voc.records(config, "val"):
        twin = by_name.pop(record.file_name)
        for mine, its in ((record.boxes, twin.boxes), (record.ignore_regions, twin.ignore_regions)):
            assert sorted(mine.tolist()) == sorted(its.tolist())
    assert not by_name
