import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding.record import Category, Record
from kd.detectors.base import Detections
from kd.evaluation.coco import check_complete, evaluate, merge, to_coco_results, to_original
from kd.evaluation.truth import GroundTruth

FIXTURE = Path(__file__).parents[2] / "../shared/data/fixtures/coco"
CLASSES = (Category(id=3, name="car"), Category(id=1, name="person"))
NAMES = {
    "APs": "AP_small",
    "APm": "AP_medium",
    "APl": "AP_large",
    "ARs": "AR_small",
    "ARm": "AR_medium",
    "ARl": "AR_large",
}


def record(image_id: int, boxes: Sequence[Sequence[float]] = (), labels: Sequence[int] = (), **rest: object) -> Record:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    sides = array[:, 2:] - array[:, :2]
    given = {
        "boxes": array,
        "labels": np.array(labels, np.int64),
        "annotation_ids": np.arange(len(array)),
        "areas": sides.prod(axis=1),
        "crowd": np.zeros(len(array), np.bool_),
        "difficult": np.zeros(len(array), np.bool_),
    }
    return Record(image_id=image_id, file_name="x.png", width=200, height=200, image=b"", **(given | rest))  # pyright: ignore


def found(
    boxes: Sequence[Sequence[float]] = (), labels: Sequence[int] = (), scores: Sequence[float] = ()
) -> Detections:
    made = torch.tensor(scores or [0.9] * len(boxes))
    return Detections(torch.tensor(boxes).reshape(-1, 4), made, torch.tensor(labels, dtype=torch.int64))


def test_no_images_and_no_objects_give_minus_one() -> None:
    empty = evaluate(GroundTruth.from_records([], CLASSES), {})
    assert set(empty.values()) == {-1.0}
    nothing = evaluate(GroundTruth.from_records([record(1)], CLASSES), {1: found([[0, 0, 9, 9]], [0])})
    assert set(nothing.values()) == {-1.0}


def test_no_detections_give_zero() -> None:
    numbers = evaluate(GroundTruth.from_records([record(1, [[0, 0, 50, 50]], [0])], CLASSES), {1: found()})
    assert numbers["AP"] == numbers["AR100"] == numbers["AP_medium"] == 0
    assert numbers["AP_small"] == -1


def test_perfect_detections_give_one_in_every_range_that_holds_objects() -> None:
    boxes, labels = [[0, 0, 6, 6], [20, 20, 32, 30], [50, 50, 75, 70], [100, 0, 150, 60]], [0, 1, 0, 1]
    truth = GroundTruth.from_records([record(1, boxes, labels), record(2)], CLASSES)
    numbers = evaluate(truth, {1: found(boxes, labels), 2: found()}, per_class=True)
    ones = ("AP", "AP50", "AP75", "AP_0_8", "AP_8_16", "AP_16_32", "AP_small", "AP_medium", "AR100", "AP_class/car")
    assert {name: numbers[name] for name in ones} == dict.fromkeys(ones, pytest.approx(1.0))
    assert numbers["AP_large"] == -1


def test_the_official_numbers_of_the_coco_api() -> None:
    if not FIXTURE.exists():
        pytest.skip(f"needs the fixtures at {FIXTURE}")
    labels = json.loads((FIXTURE / "instances_val2014_100.json").read_text())
    categories = tuple(Category(id=c["id"], name=c["name"]) for c in labels["categories"])
    position = {c.id: i for i, c in enumerate(categories)}
    truth = GroundTruth.from_records(_records(labels, position), categories)
    detections = {}
    results = json.loads((FIXTURE / "instances_val2014_fakebbox100_results.json").read_text())
    for image_id in truth.image_ids:
        own = [r for r in results if r["image_id"] == image_id]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in own)]
        detections[image_id] = found(corners, [position[r["category_id"]] for r in own], [r["score"] for r in own])
    numbers = evaluate(truth, detections)
    expected = json.loads((FIXTURE / "expected.json").read_text())["bbox"]
    assert {k: numbers[NAMES.get(k, k)] for k in expected} == pytest.approx(expected, abs=1e-6)


def _records(labels: dict, position: dict[int, int]) -> Iterator[Record]:
    for image in labels["images"]:
        own = [a for a in labels["annotations"] if a["image_id"] == image["id"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
        yield record(
            image["id"],
            corners,
            [position[a["category_id"]] for a in own],
            areas=np.array([a["area"] for a in own], np.float32),
            crowd=np.array([a["iscrowd"] for a in own], np.bool_),
        )


@pytest.mark.parametrize("cap", [1, 2, 300])
def test_ap_obeys_the_greatest_cap_whatever_it_is(cap: int) -> None:
    boxes = [[20.0 * i, 0, 20.0 * i + 10, 10] for i in range(4)]
    truth = GroundTruth.from_records([record(1, boxes, [0] * 4)], CLASSES)
    numbers = evaluate(truth, {1: found(boxes, [0] * 4, [0.9, 0.8, 0.7, 0.6])}, max_dets=(cap,))
    assert numbers[f"AR{cap}"] == pytest.approx(min(cap, 4) / 4)
    assert numbers["AP"] == pytest.approx(min(cap, 4) / 4, abs=0.01)


@pytest.mark.parametrize("kind", ["crowd", "region"])
def test_detections_in_crowds_and_ignored_regions_count_neither_way(kind: str) -> None:
    car, area = [0, 0, 40, 40], [100, 100, 200, 200]
    if kind == "crowd":
        labelled = record(1, [car, area], [0, 0], crowd=np.array([False, True]))
    else:
        labelled = record(1, [car], [0], ignore_regions=np.array([area], np.float32))
    truth = GroundTruth.from_records([labelled], CLASSES)
    inside = found([car, [110, 110, 130, 130], [150, 150, 160, 160]], [0, 0, 0], [0.5, 0.9, 0.8])
    outside = found([car, [50, 110, 70, 130]], [0, 0], [0.5, 0.9])
    assert evaluate(truth, {1: inside})["AP"] == pytest.approx(1.0)
    assert evaluate(truth, {1: outside})["AP"] < 0.6
    person = found([car, [110, 110, 130, 130]], [0, 1], [0.5, 0.9])
    assert evaluate(truth, {1: person}, per_class=True)["AP_class/person"] == -1


def test_difficult_objects_need_not_be_found_and_finding_one_is_no_mistake() -> None:
    car, hard = [0, 0, 40, 40], [100, 100, 150, 150]
    truth = GroundTruth.from_records([record(1, [car, hard], [0, 0], difficult=np.array([False, True]))], CLASSES)
    missed = evaluate(truth, {1: found([car], [0], [0.5])})
    assert (missed["AP"], missed["AR100"]) == (pytest.approx(1.0), pytest.approx(1.0))
    both = found([car, hard], [0, 0], [0.5, 0.9])
    assert evaluate(truth, {1: both})["AP"] == pytest.approx(1.0)
    # A part of a difficult object is not the object, unlike a part of a crowd.
    inside = found([car, [110, 110, 130, 130]], [0, 0], [0.5, 0.9])
    assert evaluate(truth, {1: inside})["AP"] < 0.6
    only = GroundTruth.from_records([record(1, [hard], [0], difficult=np.array([True]))], CLASSES)
    assert evaluate(only, {1: found([hard], [0])})["AP"] == -1


def test_the_first_annotation_counts_too() -> None:
    # pycocotools takes a ground truth id of 0 for `no match`; ours begin at 1, whatever the records say.
    truth = GroundTruth.from_records([record(0, [[0, 0, 40, 40]], [0])], CLASSES)
    assert evaluate(truth, {0: found([[0, 0, 40, 40]], [0])})["AP"] == pytest.approx(1.0)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(GroundTruth.from_records([record(1, [[0, 0, 9, 9]], [0])], CLASSES), {1: found([[0, 0, 9, 9]], [0])})
    assert capsys.readouterr().out == ""


def test_mistakes_are_told() -> None:
    truth = GroundTruth.from_records([record(1), record(2)], CLASSES)
    with pytest.raises(ValueError, match=r"1 missing \(ids \[2\]\), 1 unexpected \(ids \[5\]\)"):
        evaluate(truth, {1: found(), 5: found()})
    with pytest.raises(ValueError, match="rising"):
        evaluate(truth, {}, max_dets=(10, 1))
    with pytest.raises(ValueError, match="small"):
        evaluate(truth, {}, sizes={"small": (0, 8)})
    with pytest.raises(ValueError, match="1 of 2 are repeated"):
        GroundTruth.from_records([record(1), record(1)], CLASSES)
    with pytest.raises(ValueError, match=r"ids \[9\]"):
        truth.subset([1, 9])
    check_complete([1, 2], [2, 1])


def test_a_subset_keeps_the_labels_of_its_images_only() -> None:
    truth = GroundTruth.from_records([record(i, [[0, 0, 9, 9]], [0]) for i in (1, 2, 3)], CLASSES).subset([3, 1])
    assert truth.image_ids == (1, 3)
    assert [a["image_id"] for a in truth.annotations] == [1, 3]


def test_canvas_boxes_go_back_to_original_pixels() -> None:
    assert to_original(found(), (50, 100), (500, 400)).boxes.shape == (0, 4)
    scaled = to_original(found([[10, 5, 100, 50]], [1]), valid=(50, 100), original=(500, 400))
    assert scaled.boxes.tolist() == [[40, 50, 400, 500]]
    assert to_original(found([[0, 0, 101, 51]], [1]), (50, 100), (500, 400)).boxes.tolist() == [[0, 0, 400, 500]]


def test_results_are_in_cocos_format() -> None:
    results = to_coco_results({4: found([[1, 2, 4, 8]], [1], [0.5]), 5: found()}, CLASSES)
    assert results == [{"image_id": 4, "category_id": 1, "bbox": [1, 2, 3, 6], "score": 0.5}]
    assert json.loads(json.dumps(results)) == results


def test_ranks_merge_without_dummies_and_duplicates() -> None:
    one, two, other = found([[0, 0, 1, 1]], [0]), found([[0, 0, 2, 2]], [0]), found([[0, 0, 3, 3]], [0])
    merged = merge([{1: one, 2: two}, {2: other, -1: other}, {}])
    assert merged == {1: one, 2: two}
    assert merge([]) == {}
