"""A student at work finds the same whoever asks, in pixels of the image it was given, without the cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd import deploy
from kd.slicing import SliceConfig, sliced
from tests.kd.students import pictures, predictor, saved


def test_no_image_has_no_answer() -> None:
    assert predictor()[0]([]) == []


def test_images_of_many_sizes_come_back_in_their_order_as_if_alone() -> None:
    look, _ = predictor(batch=2)
    images = [picture for size in ((60, 80), (80, 60), (40, 150), (61, 80)) for picture in pictures(2, *size)]
    together = look(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = look([image])
        assert len(alone.boxes) == len(found.boxes) > 0
        assert torch.allclose(alone.boxes, found.boxes, atol=1e-3)
        assert torch.equal(alone.labels, found.labels)
        limits = torch.tensor([image.shape[2], image.shape[1]]).repeat(2)
        assert (found.boxes >= 0).all()
        assert (found.boxes <= limits).all()
        assert found.boxes[:, 2:].amax() > 0.8 * min(image.shape[1:])  # image pixels, not canvas pixels


def test_larger_canvases_are_rendered_from_the_image_itself() -> None:
    look, _ = predictor()
    twice = deploy.Predictor(look.detector, look.views, factor=2)
    (image,) = pictures(1, 60, 80)
    assert len(twice([image])[0].boxes) > 0
    assert not torch.equal(twice([image])[0].boxes, look([image])[0].boxes)


def test_one_tile_that_holds_the_image_is_no_slicing() -> None:
    look, info = predictor()
    (image,) = pictures(1, 60, 80)
    config = SliceConfig(size=(60, 80), nms=info.config.nms)
    found, (plain,) = sliced(image, look, config), look([image])
    assert torch.equal(found.boxes, plain.boxes)
    assert torch.equal(found.labels, plain.labels)


def test_a_saved_student_looks_like_the_one_that_was_saved(tmp_path: Path) -> None:
    images = pictures(2, 60, 80)
    look, info = deploy.load(saved(tmp_path))
    assert [c.name for c in info.categories] == ["person", "car", "bicycle"]
    for one, two in zip(look(images), predictor(batch=8)[0](images), strict=True):
        assert torch.equal(one.boxes, two.boxes)


def test_another_score_threshold_keeps_the_better_ones(tmp_path: Path) -> None:
    images = pictures(1, 60, 80)
    folder = saved(tmp_path)
    (every,) = deploy.load(folder)[0](images)
    middle = float(every.scores.median())
    (better,) = deploy.load(folder, score=middle)[0](images)
    assert torch.equal(better.scores, every.scores[every.scores > middle])


def test_a_student_that_does_not_say_how_images_are_rendered_is_refused(tmp_path: Path) -> None:
    facts = json.loads((saved(tmp_path) / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps(facts | {"input": {"short_side": None}}))
    with pytest.raises(ValueError, match=r"\(long_side, buckets missing"):
        deploy.load(tmp_path)


def test_a_device_needs_neither_the_cluster_nor_the_training_data(tmp_path: Path) -> None:
    saved(tmp_path)
    code = (
        "import sys, torch\n"
        "from kd import deploy, export\n"
        "from kd.slicing import SliceConfig, sliced\n"
        f"look, info = deploy.load({str(tmp_path)!r})\n"
        "image = torch.zeros(3, 60, 80, dtype=torch.uint8)\n"
        "sliced(image, look, SliceConfig(size=(40, 40)))\n"
        "extra = {'ray', 'deepspeed', 'mlflow', 'pydantic', 'yaml', 'pyarrow', 'pycocotools', 'onnx'}\n"
        "assert not extra & set(sys.modules), extra & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
