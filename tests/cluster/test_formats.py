"""Every label format goes the whole way by its shipped recipe, from files over training steps to an evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import build, packing
from cluster.config import RunConfig, load
from cluster.scoring import ground_truth, score
from data_sharding.loader import Loader, order_of
from data_sharding.world import World
from kd.clock import Clock
from kd.distiller import Distiller
from kd.engine import PlainEngine
from kd.step import train_step
from tests.data_sharding.formats import FORMATS, Format

SMALL = {
    "student.backbone": {"name": "mobilenetv2", "width_mult": 0.25, "norm": "group"},
    "student.width": 32,
    "student.head_depth": 1,
    "student.score_threshold": 0.001,
    "optim.batch": 2,
    "optim.steps": 2,
    "optim.warmup": 0,
    "views.short_side": [64],
    "views.long_side": 128,
    "views.buckets": [[128, 128]],
    "evaluation.batch": 2,
    "resources.threads": 1,
}
WHOLE = {"short_side": 128, "long_side": 256, "buckets": [[256, 256]]}


def _recipe(name: str, train: Format, val: Format, storage: Path) -> RunConfig:
    def split(data: Format) -> Any:
        given = data.config.train
        if name == "coco":
            return {"images": str(given.images), "annotations": str(given.annotations)}
        return str(given) if name == "visdrone" else [{"folder": str(given[0].folder), "list": "train"}]

    recipe = {"coco": "hit_uav_student", "visdrone": "visdrone_student", "voc": "voc_student"}[name]
    own: dict[str, Any] = {
        "coco": {"data.ignore_categories": []},
        "visdrone": {"evaluation.views": WHOLE},
        "voc": {"data.classes": ["car"]},
    }
    paths = {"data.train": split(train), "data.val": split(val), "storage": str(storage)}
    return load(recipe, {**SMALL, **own[name], **paths})


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_trains_and_is_evaluated_by_its_recipe(name: str, tmp_path: Path) -> None:
    config = _recipe(name, *(FORMATS[name](tmp_path / s, "stop") for s in ("train", "val")), tmp_path / "runs")
    packing.pack_splits(config)
    train, val = build.open_train(config), build.open_val(config)
    student = build.build_student(config, len(train.dataset.categories)).train()
    engine = PlainEngine(Distiller(student, {}), config.optim)
    order = order_of(train.dataset, train.views, seed=0, batch=config.optim.batch)
    with Loader(train.dataset, train.views, order, world=World(), threads=1) as loader:
        for step in range(config.optim.steps):
            report = train_step(engine, next(loader), {}, {}, config.optim, step, World(), Clock())
            assert math.isfinite(report.metrics()["loss/total"])
    found = score(student.eval(), val, ground_truth(val), config.evaluation, world=World(), device=torch.device("cpu"))
    assert len(found.detections) == 4
    assert 0 <= found.metrics["AP"] <= 100
    assert f"AR{config.evaluation.max_dets[-1]}" in found.metrics
    if name == "visdrone":
        assert (train.views.count, val.views.count) == (8, 1)
        assert json.loads(train.views.config.geometry)["tiles"]["grid"] == [2, 2]
        assert val.views.view(0, 0).crop == (0, 0, int(val.dataset.widths[0]), int(val.dataset.heights[0]))
