"""The ONNX file finds what the student finds, on every image of its size; one that does not is never left behind."""

import json
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as transforms

from kd import export
from kd.detectors.base import Detections
from kd.export_resize import Resize
from tests.kd.students import DETECTORS, photographs, pictures, predictor


def nothing() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


sides = st.integers(1, 200)


@settings(max_examples=60, deadline=None)
@given(before=st.tuples(sides, sides), after=st.tuples(sides, st.integers(2, 200)), seed=st.integers(0, 99))
def test_the_resize_is_torchvisions_to_the_bit(before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *before), dtype=torch.uint8, generator=draw)
    wanted = transforms.resize(image, list(after), antialias=True)
    assert torch.equal(Resize(before, after)(image.int()), wanted.int())


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [(96, 128), (150, 90)], ids=["as it is", "resized"])
def test_the_file_finds_what_the_student_finds(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    look, info = predictor(name)
    images = pictures(4, *size)
    parity = export.export(look, info, images, tmp_path / "new" / "student.onnx")
    assert parity.images == 4
    assert parity.boxes == sum(len(found.boxes) for found in look(images)) > 40
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student.onnx"]


def test_it_does_on_real_images_too(shared_data: Path, tmp_path: Path) -> None:
    look, info = predictor(score_threshold=0.02, detections=100, levels=(2, 3, 4))
    images = photographs(shared_data, 6)
    parity = export.export(look, info, images[:1], tmp_path / "student.onnx")
    other = export.compare(look, export.open_session(tmp_path / "student.onnx"), images[1:])
    assert other.boxes > 100
    assert max(parity.box_error, other.box_error) <= 1e-3
    assert max(parity.score_error, other.score_error) <= 1e-4


def test_an_image_without_objects_gives_none(tmp_path: Path) -> None:
    look, _ = predictor()
    bad, good = sorted(pictures(2, 60, 80), key=lambda image: float(look([image])[0].scores[0]))
    best = [float(found.scores[0]) for found in look([bad, good])]
    strict, info = predictor(score_threshold=sum(best) / 2)
    assert [len(found.boxes) > 0 for found in strict([bad, good])] == [False, True]
    export.export(strict, info, [good], tmp_path / "student.onnx")
    found = export.run(export.open_session(tmp_path / "student.onnx"), bad)
    assert found.boxes.shape == (0, 4)
    assert found.labels.dtype == torch.int64


def test_the_file_says_what_its_labels_mean(tmp_path: Path) -> None:
    look, info = predictor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a person who exports reads no tracer's warnings
        export.export(look, info, pictures(1, 60, 80), tmp_path / "student.onnx")
    model = onnx.load(tmp_path / "student.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["categories"])[1] == {"id": 4, "name": "car"}
    (image,) = model.graph.input
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [60, 80, 3]
    assert [output.name for output in model.graph.output] == ["boxes", "scores", "labels"]


def test_a_file_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, info = predictor()
    images = pictures(1, 60, 80)
    export.export(look, info, images, tmp_path / "other.onnx")
    with torch.no_grad():
        look.detector.fpn.inner_blocks[0][0].weight.mul_(1.01)  # pyright: ignore
    other = export.open_session(tmp_path / "other.onnx")
    monkeypatch.setattr(export, "open_session", lambda path: other)
    with pytest.raises(ValueError, match="the ONNX graph is not the student, image 1"):
        export.export(look, info, images, tmp_path / "student.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["other.onnx"]


def test_a_file_that_cannot_be_checked_is_not_left(tmp_path: Path) -> None:
    look, info = predictor(score_threshold=1.0)
    with pytest.raises(ValueError, match="finds nothing in the 2 image"):
        export.export(look, info, pictures(2, 60, 80), tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    look, info = predictor()
    with pytest.raises(ValueError, match=r"\(60, 80\), \(80, 60\)"):
        export.export(look, info, [*pictures(1, 60, 80), *pictures(1, 80, 60)], tmp_path / "student.onnx")


def boxes(*rows: tuple[float, float, int]) -> Detections:
    """10 px boxes from (x, score, label)."""
    x = torch.tensor([row[0] for row in rows])
    corners = torch.stack([x, x, x + 10, x + 10], 1)
    return Detections(corners, torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows]))


def test_a_comparison_takes_equal_scores_in_any_order() -> None:
    assert export.difference(nothing(), nothing()) == (0.0, 0.0)
    one, two = boxes((5.0, 0.5, 0), (50.0, 0.5, 0)), boxes((50.0005, 0.5, 0), (5.0, 0.50001, 0))
    assert export.difference(one, two) == pytest.approx((0.0005, 0.00001), rel=0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nothing(), "0 boxes instead of 2"),
        (boxes((5.0, 0.5, 0), (50.002, 0.5, 0)), "no fellow of its own within 0.001 px"),
        (boxes((5.0, 0.5, 0), (50.0, 0.5, 1)), "no fellow"),
        (boxes((5.0, 0.5, 0), (50.0, 0.501, 0)), "no fellow"),
        (boxes((5.0, 0.5, 0), (5.0, 0.5, 0)), "no fellow"),
    ],
)
def test_a_comparison_sees_what_is_wrong(other: Detections, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.difference(boxes((5.0, 0.5, 0), (50.0, 0.5, 0)), other)
