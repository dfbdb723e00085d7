import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from data_sharding.batch import Geometry
from data_sharding.record import Category
from kd import student
from kd.backbones import mobilenetv2, resnet
from kd.detectors import fcos
from tests.kd.detecting import config as tiny_config
from tests.kd.detecting import every_detector

CONFIG = fcos.Config(
    width=16, head_depth=1, levels=(2, 3), backbone=mobilenetv2.Config(width_mult=0.1), mean=(0.1, 0.2, 0.3)
)
CLASSES = (Category(id=7, name="car"), Category(id=1, name="person"))


def saved(folder: Path) -> fcos.FCOS:
    torch.manual_seed(0)
    detector = fcos.build(CONFIG, 2)
    student.save(detector, CONFIG, CLASSES, folder, input={"canvas": [64, 64]}, metrics={"AP": 0.25})
    return detector


@every_detector
def test_what_is_loaded_is_what_was_saved(module: ModuleType, tmp_path: Path) -> None:
    config = tiny_config(module, levels=(2, 3), mean=(0.1, 0.2, 0.3))
    detector = module.build(config, 2)
    student.save(
        detector, config, CLASSES, tmp_path / "new" / "folder", input={"canvas": [64, 64]}, metrics={"AP": 0.25}
    )
    loaded, info = student.load(tmp_path / "new" / "folder")
    assert info.config == config
    assert info.categories == CLASSES
    assert info.input == {"canvas": [64, 64]}
    assert info.metrics == {"AP": 0.25}
    assert not loaded.training
    assert student.weights_hash(loaded) == student.weights_hash(detector)
    geometry = Geometry((64, 64), torch.tensor([[64, 64]]))
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        one, two = (
            d.eval().predict(d.features(d.normalise(images, geometry)).pyramid, geometry) for d in (detector, loaded)
        )
    assert all(torch.equal(a, b) for a, b in zip(one.class_logits, two.class_logits, strict=True))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["student.json", "student.safetensors"]


def test_saving_again_replaces_the_student(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.manual_seed(1)
    other = fcos.build(CONFIG, 2)
    student.save(other, CONFIG, CLASSES, tmp_path)
    assert student.weights_hash(student.load(tmp_path)[0]) == student.weights_hash(other)


def test_the_backbones_own_weight_file_is_not_needed_to_load(tmp_path: Path) -> None:
    file = tmp_path / "imagenet.pth"
    state = resnet.build(resnet.Config(depth=18, norm="batch")).state_dict()
    torch.save(state, file)
    config = fcos.Config(width=16, backbone=resnet.Config(depth=18, norm="frozen", weights=str(file)))
    student.save(fcos.build(config, 2), config, CLASSES, tmp_path)
    file.unlink()
    assert student.load(tmp_path)[1].config == config


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with (tmp_path / "student.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="not of one export"):
        student.load(tmp_path)


def test_another_version_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    facts = json.loads((tmp_path / "student.json").read_text())
    _edit(tmp_path, detector=facts["detector"] | {"wdith": 3})
    with pytest.raises(ValueError, match=r"unknown \['wdith'\]"):
        student.load(tmp_path)
    _edit(tmp_path, version=99)
    with pytest.raises(ValueError, match="version 99"):
        student.load(tmp_path)


def test_a_class_list_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows 2 classes, 1 categories"):
        student.save(fcos.build(CONFIG, 2), CONFIG, CLASSES[:1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hollow_replica_is_refused(tmp_path: Path) -> None:
    detector = fcos.build(CONFIG, 2)
    detector.head.regression_head.bbox_reg.weight.data = torch.zeros(0)  # as ZeRO stage 3 leaves it
    with pytest.raises(ValueError, match="gather the ZeRO shards"):
        student.save(detector, CONFIG, CLASSES, tmp_path)


def test_the_hash_sees_values_and_pixel_statistics_but_not_layout() -> None:
    torch.manual_seed(0)
    detector = fcos.build(CONFIG, 2)
    before = student.weights_hash(detector)
    assert student.weights_hash(detector.to(memory_format=torch.channels_last)) == before
    detector.mean += 0.1
    changed = student.weights_hash(detector)
    detector.fpn.inner_blocks[0][0].bias.data += 1  # pyright: ignore
    assert len({before, changed, student.weights_hash(detector)}) == 3


def test_a_student_written_before_a_setting_existed_is_read_with_its_default(tmp_path: Path) -> None:
    detector = saved(tmp_path)
    facts = json.loads((tmp_path / "student.json").read_text())["detector"]
    _edit(tmp_path, detector={name: value for name, value in facts.items() if name != "score_threshold"})
    loaded, info = student.load(tmp_path)
    assert info.config.score_threshold == fcos.Config(backbone=CONFIG.backbone).score_threshold
    assert student.weights_hash(loaded) == student.weights_hash(detector)
