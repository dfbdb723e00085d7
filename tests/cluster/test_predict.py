"""Predicting on files: COCO results that COCO's own code reads, pictures, and a broken file that stops nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import predict
from cluster.student import annotating
from cluster.student.command import command
from kd import deploy
from kd.detectors.base import Detections
from tests.kd.students import pictures, saved


def run(*arguments: object) -> int:
    return command("predict", "Look.", predict.SETTINGS, predict.act, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A grey 16-bit image, one that EXIF turns, and one that is broken, in the order of their names."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    colour, turned = (p.permute(1, 2, 0).numpy() for p in (*pictures(1, 60, 80), *pictures(1, 50, 90)))
    Image.fromarray(colour[..., 0].astype(np.uint16) * 257).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(folder / "below" / "b.jpg", exif=exif)
    (folder / "c.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def test_results_are_cocos_in_pixels_of_the_upright_image_and_a_broken_file_is_told(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    student, out = saved(tmp_path / "student"), tmp_path / "out"
    assert run(student, folder, f"out={out}", "score=0") == 3
    listed = json.loads((out / "images.json").read_text())
    sizes = [(i["id"], Path(i["file_name"]).name, i["height"], i["width"]) for i in listed["images"]]
    assert sizes == [(1, "a.png", 60, 80), (2, "b.jpg", 90, 50)]
    assert [(b["id"], Path(b["file_name"]).name) for b in listed["broken"]] == [(3, "c.jpg")]
    told = capsys.readouterr()
    assert "c.jpg: 8 bytes that cannot be decoded" in told.err
    assert "broken images" in told.out
    results = COCO(str(out / "images.json")).loadRes(str(out / "detections.json"))
    for number, _, height, width in sizes:
        found = results.imgToAnns[number]
        assert found
        assert {r["category_id"] for r in found} <= {1, 4, 7}
        corners = np.array([r["bbox"] for r in found])
        assert (corners >= 0).all()
        assert (corners[:, :2] + corners[:, 2:] <= np.array([width, height]) + 1e-3).all()
    assert [p.name for p in sorted((out / "pictures").iterdir())] == ["0001_a.jpg", "0002_b.jpg"]


def test_slices_follow_the_student_unless_the_command_says_otherwise(tmp_path: Path) -> None:
    (image,) = pictures(1, 100, 120)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    student = saved(tmp_path / "student", detections=10)
    counts = [_boxes(student, tmp_path, "slices.size=[50,60]"), _boxes(student, tmp_path)]
    facts = json.loads((student / "student.json").read_text())
    facts["input"]["slices"] = {"size": [50, 60]}
    (student / "student.json").write_text(json.dumps(facts))
    counts += [_boxes(student, tmp_path), _boxes(student, tmp_path, "slices=null")]
    assert counts[0] == counts[2] > 10  # tiles have 10 each
    assert counts[1] == counts[3] == 10


def _boxes(student: Path, folder: Path, *settings: str) -> int:
    out = folder / "out"
    assert run(student, folder / "a.png", f"out={out}", "score=0", "pictures=false", *settings) == 0
    assert not (out / "pictures").exists()
    return len(json.loads((out / "detections.json").read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no student.json"),
        (["{student}"], "name at least one image"),
        (["{student}", "{empty}"], "no images in"),
        (["{student}", "a.jpg", "scor=0.2"], "scor: no such setting; did you mean 'score'?"),
        (["{student}", "a.jpg", "score=2", "batch=x"], "batch: Input should be a valid integer"),
        (["{student}", "a.jpg", "slices.overlap=0.1"], "slices.size: required"),
        (["{student}", "a.jpg", "slices.size=[0,5]"], "size must be (height, width)"),
    ],
)
def test_a_users_mistake_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    student = saved(tmp_path / "student")
    given = [a.format(student=student, empty=tmp_path / "empty") for a in arguments]
    assert run(*given) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_words_stand_beside_tiny_boxes_and_never_on_them() -> None:
    image = torch.zeros(3, 100, 160, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 20, 24, 25], [26, 20, 30, 25], [0, 0, 4, 4], [156, 96, 160, 100]])
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 0, 1]))
    picture = np.array(annotating.annotated(image, found, ["person", "car"]))
    assert picture.shape == (400, 640, 3)  # four times as large
    for x1, y1, x2, y2 in (boxes * 4).int().tolist():
        assert not picture[y1:y2, x1:x2].any()  # the object's own pixels are free
    assert picture.any()
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert not np.array(annotating.annotated(image, empty, [])).any()


def test_the_command_adds_nothing_to_what_the_student_says(tmp_path: Path) -> None:
    (image,) = pictures(1, 60, 80)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    student, out = saved(tmp_path / "student"), tmp_path / "out"
    assert run(student, tmp_path / "a.png", f"out={out}", "score=0") == 0
    look, _ = deploy.load(student)
    (found,) = look([image])
    told = json.loads((out / "detections.json").read_text())
    assert [r["score"] for r in told] == found.scores.tolist()
    assert [r["bbox"][:2] for r in told] == found.boxes[:, :2].tolist()
