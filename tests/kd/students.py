"""Small untrained students for tests of deployment, and images for them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_sharding.images import decode
from data_sharding.record import Category
from data_sharding.view_policy import ViewConfig
from kd import student
from kd.backbones import mobilenetv2
from kd.deploy import Predictor
from kd.plugins import plugin, plugins

CLASSES = tuple(Category(id=3 * i + 1, name=name) for i, name in enumerate(("person", "car", "bicycle")))
VIEWS = ViewConfig(short_side=(96,), long_side=160, flip=0.0, buckets=((128, 128), (128, 256)))
INPUT = {"short_side": [96], "long_side": 160, "buckets": [[128, 128], [128, 256]]}
DETECTORS = sorted(plugins("kd.detectors"))


def predictor(name: str = "fcos", batch: int = 2, **settings: object) -> tuple[Predictor, student.StudentInfo]:
    """An untrained detector that takes everything for an object: many boxes, of scores that differ."""
    module = plugin("kd.detectors", name)
    backbone = mobilenetv2.Config(width_mult=0.1, norm="batch")
    given = {"width": 16, "head_depth": 1, "levels": (3, 4), "score_threshold": 0.0, "detections": 40} | settings
    config = module.Config(backbone=backbone, **given)
    torch.manual_seed(0)
    detector = module.build(config, len(CLASSES))
    info = student.StudentInfo(config=config, categories=CLASSES, input=INPUT, metrics={}, sha256="0" * 64)
    return Predictor(detector.eval(), VIEWS, batch=batch), info


def saved(folder: Path, **settings: object) -> Path:
    """The same as files."""
    found, info = predictor(**settings)  # pyright: ignore[reportArgumentType]
    return student.save(found.detector, info.config, CLASSES, folder, input=INPUT)


def pictures(count: int, height: int, width: int) -> list[Tensor]:
    """(3, h, w) uint8: coarse noise with bright rectangles."""
    draw = torch.Generator().manual_seed(height * width)
    found = []
    for _ in range(count):
        coarse = torch.rand((1, 3, 7, 9), generator=draw) * 120
        image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
        for _ in range(6):
            y, x = (int(torch.randint(0, side - 8, (1,), generator=draw)) for side in (height, width))
            image[:, y : y + 8, x : x + 6] += 130 * torch.rand((3, 1, 1), generator=draw)
        found.append(image.clamp(0, 255).to(torch.uint8))
    return found


def photographs(shared_data: Path, count: int) -> list[Tensor]:
    """Thermal images of HIT-UAV, 512 x 640."""
    files = sorted((shared_data / "hit_uav" / "normal_json" / "val").glob("*.jpg"))[:count]
    if len(files) < count:
        pytest.skip("the real images are not beside the project")
    return [decode(path.read_bytes(), path.name) for path in files]
