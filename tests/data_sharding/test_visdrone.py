"""Promises of the VisDrone reader: native files as they are, and every irregular line of the official ones told."""

import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_sharding.datasets import visdrone
from data_sharding.datasets._visdrone_lines import read_lines
from data_sharding.images import decode
from data_sharding.problems import Problems


def _config(folder: Path, lines: str = "", **settings: object) -> visdrone.Config:
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in ("b", "a"):
        Image.new("RGB", (40, 30)).save(folder / f"images/{name}.jpg")
        (folder / f"annotations/{name}.txt").write_text(lines if name == "a" else "")
    return visdrone.Config(train=folder, **settings)  # pyright: ignore[reportArgumentType]


def test_an_image_with_an_empty_label_file_is_kept(tmp_path: Path) -> None:
    first, second = visdrone.records(_config(tmp_path), "train")
    assert (first.file_name, first.image_id, second.file_name, second.image_id) == ("a.jpg", 1, "b.jpg", 2)
    assert (first.boxes.shape, first.ignore_regions.shape) == ((0, 4), (0, 4))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: no such folder; a VisDrone split holds"):
        visdrone.source(visdrone.Config(train=tmp_path), "train")
    for part in ("images", "annotations"):
        (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match="1 x split without usable images"):
        visdrone.source(visdrone.Config(train=tmp_path), "train")


LINES = "1,2,10,20,1,4,0,0\n0,0,5,5,0,0,0,0\n8,8,4,4,0,11,0,0\n20,20,6,6,0,1,0,0\n30,20,15,15,1,10,1,2,\n"


def test_labels_arrive_as_the_official_toolkit_means_them(tmp_path: Path) -> None:
    source = visdrone.source(_config(tmp_path, LINES), "train")
    first = source.read(0)
    assert [c.name for c in visdrone.categories(visdrone.Config())][3] == "car"
    assert first.labels.tolist() == [3, 9]
    assert first.boxes.tolist() == [[1, 2, 11, 22], [30, 20, 40, 30]]
    assert first.annotation_ids.tolist() == [1, 5]
    # Class 0, `others` and an object of score 0.
    assert first.ignore_regions.tolist() == [[0, 0, 5, 5], [8, 8, 12, 12], [20, 20, 26, 26]]
    notes = Counter((p.costs, p.kind.split(" (")[0], p.annotation) for p in source.problems.found)
    assert notes == Counter(
        {("nothing", "trailing comma", "line 5"): 1, ("nothing", "box reaching out of the image", "line 5"): 1}
    )
    others = visdrone.source(_config(tmp_path, LINES, others="background"), "train").read(0)
    assert others.ignore_regions.tolist() == [[0, 0, 5, 5], [20, 20, 26, 26]]


def test_names_without_a_partner_and_twins_are_told(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (tmp_path / "annotations/b.txt").unlink()
    (tmp_path / "annotations/c.txt").write_text("")
    with pytest.raises(ValueError, match=r"1 x image without a label file; 1 x label file without an image") as told:
        visdrone.source(config, "train")
    assert "  b.jpg: image without a label file" in str(told.value)
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match=r"1 x two images of one name.*\n.*a \(a\.jpg, a\.png\)"):
        visdrone.source(config, "train")


def test_ids_do_not_depend_on_what_is_skipped(tmp_path: Path) -> None:
    config = replace(_config(tmp_path), on_bad="skip")
    (tmp_path / "images/a.jpg").unlink()
    (only,) = visdrone.records(config, "train")
    assert (only.file_name, only.image_id) == ("b.jpg", 2)


def test_every_official_label_file_parses_and_each_irregular_line_is_told(shared_data: Path) -> None:
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    told: Counter[tuple[str, str]] = Counter()
    categories: Counter[int] = Counter()
    with tarfile.open(shared_data / "visdrone/annotations_all_native.tar.xz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                continue
            split = next(part for part in Path(member.name).parts if part.startswith("VisDrone"))
            data, problems = content.read(), Problems(member.name)
            found = read_lines(data, member.name, None, problems)
            files[split] += 1
            lines[split] += data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
            told.update((split.removeprefix("VisDrone2019-DET-"), p.kind) for p in problems.found)
            assert len(found) == len(data.splitlines()) - sum(p.costs == "annotation" for p in problems.found)
            if split.endswith("train"):
                categories.update(line.category for line in found)
    assert dict(files) == {
        "VisDrone2019-DET-train": 6471,
        "VisDrone2019-DET-val": 548,
        "VisDrone2019-DET-test-dev": 1610,
    }
    assert sum(lines.values()) == 353550 + 40169 + 77547
    assert told == Counter({("train", "trailing comma"): 34, ("train", "box without area"): 3})
    assert sum(categories.values()) == 353550 - 3
    assert categories[4] == 144867 - 1


def test_the_real_images_are_read_with_their_labels(shared_data: Path) -> None:
    config = visdrone.Config(
        train=shared_data / "visdrone/VisDrone2019-DET-train", val=shared_data / "visdrone/VisDrone2019-DET-val"
    )
    source = visdrone.source(config, "val")
    records = list(source)
    assert (len(records), sum(len(r.boxes) for r in records)) == (10, 909)
    assert sum(len(r.ignore_regions) for r in records) == 32  # in validation `others` are background
    assert not source.problems.found
    assert decode(records[0].image).shape == (3, records[0].height, records[0].width)
