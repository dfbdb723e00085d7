"""Students and teachers of any backbone, width and family fit, or are refused by a sentence that names both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import RunConfig, load
from cluster.grammar import ConfigError
from cluster.pairs import require_fitting_pairs
from data_sharding.record import Category
from kd import student
from kd.backbones import resnet
from kd.plugins import plugins
from tests.cluster.test_build import TAUGHT
from tests.kd.detecting import DETECTORS
from tests.kd.detecting import config as tiny

CATEGORIES = tuple(Category(id=i, name=f"thing {i}") for i in range(3))
METHODS = plugins("kd.methods")
ANSWERS = [name for name, module in METHODS.items() if module.Loss.needs_head]
"""They compare what two heads say, so the pair must be of one make."""
PYRAMIDS_ALONE: dict[str, Any] = {"od": {"soft": 0.0, "box": 0.0}, "defeat": {"objects": 0.0, "rest": 0.0}}
"""What makes methods that can compare answers as well leave it."""
ELSEWHERE = ("scalekd", "clsd")
"""Of the recipe itself; in need of a classifier's weights."""
OTHERS: dict[str, Any] = {
    f"distill.{name}": PYRAMIDS_ALONE.get(name, {}) for name in METHODS if name not in (*ANSWERS, *ELSEWHERE)
}
SMALL_TWO_STAGE = {"roi_width": 16, "roi_samples": 16, "proposals": 50}


def teacher(folder: Path, kind: str, **changes: Any) -> Path:
    """On another backbone, twice as wide as the student, with random weights."""
    torch.manual_seed(1)
    backbone = resnet.Config(depth=18, norm="group")
    config = tiny(DETECTORS[kind], width=64, backbone=backbone, **{"levels": (3, 4, 5)} | changes)
    return student.save(DETECTORS[kind].build(config, len(CATEGORIES)), config, CATEGORIES, folder)


def recipe(storage: Path, weights: Path, kind: str, **more: Any) -> RunConfig:
    settings = TAUGHT | {"storage": str(storage), "teachers.0.weights": str(weights)}
    if "distill" in more:
        settings = {key: value for key, value in settings.items() if not key.startswith("distill.")}
    else:
        settings |= OTHERS
    settings |= {"student.name": kind}
    if kind == "faster_rcnn":
        settings |= {f"student.{name}": value for name, value in SMALL_TWO_STAGE.items()}
    return load("digits_scalekd", settings | more)


@pytest.mark.parametrize("teaching", DETECTORS)
@pytest.mark.parametrize("learning", DETECTORS)
def test_every_family_teaches_every_family(learning: str, teaching: str, tmp_path: Path) -> None:
    """With every method that compares pyramids; another backbone and width on the teacher's side."""
    require_fitting_pairs(recipe(tmp_path, teacher(tmp_path / "t", teaching), learning), CATEGORIES)


@pytest.mark.parametrize("method", [*ANSWERS, *PYRAMIDS_ALONE])
def test_a_method_that_compares_answers_refuses_a_teacher_of_another_make(method: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, teacher(tmp_path / "t", "retinanet"), "faster_rcnn", distill={method: {}})
    with pytest.raises(ConfigError, match=r"retinanet on resnet.*faster_rcnn on mobilenetv2.*(two heads say|set bins)"):
        require_fitting_pairs(config, CATEGORIES)


def test_levels_that_cannot_be_had_are_told_with_both_sides(tmp_path: Path) -> None:
    weights = teacher(tmp_path / "t", "fcos", levels=(5, 6))
    with pytest.raises(ConfigError) as told:
        require_fitting_pairs(recipe(tmp_path, weights, "retinanet"), CATEGORIES)
    message = str(told.value)
    assert "'teacher' (fcos on resnet, P5 to P6, 64 wide) cannot teach the student" in message
    assert "(retinanet on mobilenetv2, P3 to P5, 32 wide) at 2x with" in message
    assert "give the teacher finer levels or the student coarser ones" in message


def test_settings_that_contradict_the_shapes_are_told_too(tmp_path: Path) -> None:
    weights = teacher(tmp_path / "t", "retinanet")
    with pytest.raises(ConfigError, match=r"retinanet on resnet.*fcos on mobilenetv2.*3 heads must divide"):
        require_fitting_pairs(recipe(tmp_path, weights, "fcos", **{"distill.scalekd.csa": {"heads": 3}}), CATEGORIES)


def test_a_method_without_a_teacher_is_tried_too(tmp_path: Path) -> None:
    settings = TAUGHT | {"storage": str(tmp_path), "teachers": [], "distill": {"lgd": {"heads": 4}}}
    settings = {key: value for key, value in settings.items() if not key.startswith("distill.")}
    config = load("digits_scalekd", settings)
    require_fitting_pairs(config, CATEGORIES)
    with pytest.raises(ConfigError, match=r"distill: lgd cannot go with the student \(fcos.*3 heads must divide"):
        require_fitting_pairs(load("digits_scalekd", settings | {"distill.lgd.heads": 3}), CATEGORIES)
