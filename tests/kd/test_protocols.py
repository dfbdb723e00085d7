"""VisDrone's and VOC's own evaluations give the numbers of the official tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.record import Category, Record
from kd.detectors.base import Detections
from kd.evaluation import visdrone, voc
from kd.evaluation.truth import GroundTruth, ImageLabels

NOTHING = np.zeros((0, 4), np.float32)
LAST = np.array([0, 0, 1, 1])
"""Added to a width and height that stop before the last pixel of a box."""


def _image(
    number: int, size: tuple[int, int], boxes: np.ndarray, labels: np.ndarray, regions: np.ndarray = NOTHING
) -> ImageLabels:
    return ImageLabels(
        image_id=number,
        width=size[1],
        height=size[0],
        boxes=boxes.astype(np.float32).reshape(-1, 4),
        labels=labels.astype(np.int64),
        difficult=np.zeros(len(labels), np.bool_),
        ignore_regions=regions,
    )


def _truth(images: list[ImageLabels], classes: int) -> GroundTruth:
    return GroundTruth(
        categories=tuple(Category(i, str(i)) for i in range(1, classes + 1)),
        image_ids=tuple(i.image_id for i in images),
        images=tuple(images),
        annotations=(),
    )


def _found(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long())


def _corners(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:, :2], rows[:, :2] + rows[:, 2:4]], axis=1)


def _numbers(path: Path, separator: str | None, first: int = 0) -> np.ndarray:
    lines = path.read_text().splitlines()
    return np.array([[float(v) for v in line.rstrip(",").split(separator)[first:]] for line in lines])


@pytest.mark.parametrize("detector", ["mmdetr", "mmdino"])
def test_visdrone_numbers_are_the_official_toolkits(detector: str, shared_data: Path) -> None:
    folder = shared_data / "fixtures" / "visdrone"
    sizes = json.loads((folder / "mm_val5" / "sizes.json").read_text())
    images, found = [], {}
    for number, (stem, size) in enumerate(sorted(sizes.items()), start=1):
        rows = _numbers(folder / "mm_val5" / "annotations" / f"{stem}.txt", ",")
        objects, regions = rows[(rows[:, 5] > 0) & (rows[:, 5] < 11)], rows[rows[:, 5] == 0]
        canvas = (size["height"], size["width"])
        images.append(_image(number, canvas, _corners(objects), objects[:, 5] - 1, _corners(regions)))
        told = _numbers(folder / "mm_val5" / detector / f"{stem}.txt", ",")
        found[number] = _found(_corners(told), told[:, 4], told[:, 5] - 1)
    numbers = visdrone.evaluate(_truth(images, 10), found)
    expected = json.loads((folder / "expected.json").read_text())[f"mm_val5/{detector}"]
    for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500"):
        assert 100 * numbers[name] == pytest.approx(expected[name], abs=1e-8), name
    for name, value in expected["unweighted_class_mean"].items():
        assert 100 * numbers[f"{name}_classes"] == pytest.approx(value, abs=1e-8), name


def test_voc_numbers_are_those_of_the_published_case(shared_data: Path) -> None:
    folder = shared_data / "fixtures" / "voc_test_case_1"
    images, found = [], {}
    for number, path in enumerate(sorted((folder / "gts").glob("*.txt")), start=1):
        boxes, told = _numbers(path, None, 1), _numbers(folder / "dets" / path.name, None, 1)
        images.append(_image(number, (999, 999), _corners(boxes + LAST), np.zeros(len(boxes))))
        found[number] = _found(_corners(told[:, 1:] + LAST), told[:, 0], np.zeros(len(told)))
    expected = json.loads((folder / "expected.json").read_text())
    # The published 11-point number at 0.1 compares a recall of 9/15 with 0.6000000000000001: there it misses 9/23.
    missed = {"0.1": 9 / 23 / 11}
    for iou, value in expected["every_point"].items():
        numbers = voc.evaluate(_truth(images, 1), found, float(iou))
        assert numbers["AP"] == pytest.approx(value, abs=1e-9)
        assert numbers["AP_2007"] == pytest.approx(expected["11_point"][iou] + missed.get(iou, 0), abs=1e-9)


@pytest.mark.parametrize("protocol", [visdrone, voc])
def test_without_objects_there_is_no_number_and_without_detections_zero(protocol: object) -> None:
    empty = _image(1, (10, 10), NOTHING, np.zeros(0))
    one = _image(1, (10, 10), np.array([[0, 0, 5, 5]]), np.zeros(1))
    nothing = {1: _found(NOTHING, np.zeros(0), np.zeros(0))}
    evaluate = protocol.evaluate  # pyright: ignore[reportAttributeAccessIssue]
    assert set(evaluate(_truth([empty], 2), nothing).values()) == {-1.0}
    assert set(evaluate(_truth([one], 2), nothing).values()) == {0.0}
    with pytest.raises(ValueError, match="missing"):
        evaluate(_truth([one], 2), {})


@pytest.mark.parametrize("protocol", [visdrone, voc])
def test_a_second_detection_of_an_object_is_wrong(protocol: object) -> None:
    box = np.array([[0.0, 0.0, 8.0, 8.0]])
    evaluate = protocol.evaluate  # pyright: ignore[reportAttributeAccessIssue]
    truth = _truth([_image(1, (20, 20), np.concatenate([box, box + 10]), np.zeros(2))], 1)
    twice = {1: _found(np.concatenate([box, box, box + 10]), np.array([0.9, 0.8, 0.7]), np.zeros(3))}
    assert evaluate(truth, twice)["AP"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_difficult_object_of_voc_counts_neither_way_however_often_it_is_found() -> None:
    boxes = np.array([[0, 0, 8, 8], [10, 10, 18, 18]], np.float32)
    record = Record(
        image_id=1, file_name="a", width=20, height=20, image=b"", boxes=boxes, labels=np.zeros(2, np.int64),
        annotation_ids=np.arange(2), areas=np.full(2, 64, np.float32), crowd=np.zeros(2, np.bool_),
        difficult=np.array([False, True]),
    )  # fmt: skip
    truth = GroundTruth.from_records([record], [Category(1, "car")])
    found = {1: _found(np.concatenate([boxes[1:], boxes[1:], boxes[:1]]), np.array([0.9, 0.8, 0.7]), np.zeros(3))}
    assert voc.evaluate(truth, found)["AP"] == 1.0
    assert voc.evaluate(truth, {1: _found(boxes[1:], np.array([0.9]), np.zeros(1))})["AP"] == 0.0


def test_what_lies_half_in_an_ignored_region_of_visdrone_is_dropped_on_both_sides() -> None:
    region = np.array([[10.0, 10.0, 30.0, 30.0]])
    inside, half_out, outside = np.array([[12, 12, 20, 20]]), np.array([[24, 12, 36, 20]]), np.array([[31, 12, 39, 20]])
    kept = visdrone.outside_ignored(np.concatenate([inside, half_out, outside]).astype(float), region, (50, 50))
    assert kept.tolist() == [False, False, True]
    truth = _truth([_image(1, (50, 50), np.concatenate([inside, outside]), np.zeros(2), region)], 1)
    found = {1: _found(np.concatenate([inside, outside]).astype(float), np.array([0.9, 0.8]), np.zeros(2))}
    assert visdrone.evaluate(truth, found)["AP"] == 1.0
    assert visdrone.evaluate(truth, {1: _found(outside.astype(float), np.array([0.8]), np.zeros(1))})["AR1"] == 1.0


def test_visdrone_caps_count_the_detections_of_all_classes() -> None:
    boxes = np.array([[0, 0, 8, 8], [10, 10, 18, 18]])
    truth = _truth([_image(1, (20, 20), boxes, np.array([0, 1]))], 2)
    found = {1: _found(boxes.astype(float), np.array([0.9, 0.8]), np.array([0, 1]))}
    numbers = visdrone.evaluate(truth, found)
    assert (numbers["AR1"], numbers["AR10"]) == (0.5, 1.0)
