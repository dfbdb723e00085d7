"""Evaluation gives the same numbers however many ranks share it, and covers each image once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import build, packing
from cluster.config import RunConfig, load
from cluster.scoring import ground_truth, score
from data_sharding.world import World
from tests.cluster.two_ranks import ranks

SMALL = {
    "data.train": 8,
    "data.val": 7,  # not a multiple of ranks x batch: some images are dummies
    "data.image_size": 128,
    "data.digit_size": [8, 28],
    "student.backbone": {"name": "mobilenetv2", "width_mult": 0.25, "norm": "group"},
    "student.width": 32,
    "student.head_depth": 1,
    "student.levels": [3, 4, 5],
    "student.score_threshold": 0.001,
    "evaluation.batch": 2,
    "resources.threads": 1,
}


def recipe(storage: Path, **more: Any) -> RunConfig:
    return load("digits_student", SMALL | {"storage": str(storage)} | more)


def scored(
    world: World, storage: Path, factor: int, first: int | None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    config = recipe(storage, **(settings or {}))
    val = build.open_val(config)
    detector = build.build_student(config, len(val.dataset.categories)).eval()
    looked, plain = [0], detector.detect

    def detect(outputs: Any, geometry: Any) -> Any:
        looked[0] += len(geometry.sizes)
        return plain(outputs, geometry)

    detector.detect = detect
    found = score(
        detector,
        val,
        ground_truth(val, first),
        config.evaluation,
        world=world,
        device=torch.device("cpu"),
        factor=factor,
        first=first,
    )
    return {"metrics": found.metrics, "boxes": {i: d.boxes for i, d in found.detections.items()}, "looked": looked[0]}


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("factor", "first", "settings", "looks"),
    [
        (1, None, {}, [4, 4]),  # 7 images and one dummy
        (2, 3, {}, [2, 2]),
        (1, None, {"evaluation.slices.size": [64, 64]}, None),
    ],
)
def test_two_ranks_find_what_one_finds_and_share_the_work(
    tmp_path: Path, factor: int, first: int | None, settings: dict[str, Any], looks: list[int] | None
) -> None:
    packing.pack_splits(recipe(tmp_path))

    alone = scored(World(), tmp_path, factor, first, settings)
    shared = ranks()(scored, tmp_path, factor, first, settings)

    share = [rank["looked"] / alone["looked"] for rank in shared]
    assert [rank["looked"] for rank in shared] == looks if looks else share == pytest.approx([4 / 7, 3 / 7])

    assert shared[0]["metrics"] == shared[1]["metrics"] == alone["metrics"]
    assert len(alone["boxes"]) == (first or 7)
    assert shared[0]["boxes"].keys() == alone["boxes"].keys()
    assert all(torch.equal(shared[0]["boxes"][i], boxes) for i, boxes in alone["boxes"].items())
    assert sum(len(boxes) for boxes in alone["boxes"].values()) > 0


def test_tiles_are_scored_in_whole_images_and_one_tile_is_no_slicing(tmp_path: Path) -> None:
    packing.pack_splits(recipe(tmp_path))
    plain = scored(World(), tmp_path, 1, 3)
    whole = scored(World(), tmp_path, 1, 3, {"evaluation.slices.size": [128, 128]})
    tiles = scored(World(), tmp_path, 1, 3, {"evaluation.slices": {"size": [64, 64], "detections": 300}})
    assert whole["boxes"].keys() == plain["boxes"].keys() == tiles["boxes"].keys()
    for image, boxes in plain["boxes"].items():
        assert torch.allclose(whole["boxes"][image], boxes, atol=1e-3)
    assert sum(map(len, tiles["boxes"].values())) > sum(map(len, plain["boxes"].values()))  # 100 per tile, 300 in all
    assert all(boxes.max() > 64 for boxes in tiles["boxes"].values())
