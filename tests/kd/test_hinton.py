"""Hinton's distillation against its equation, at locations and at regions."""

from dataclasses import replace

import pytest
import torch

from data_sharding.batch import Outputs, Taps
from kd.detectors import faster_rcnn
from kd.methods import hinton
from kd.methods.base import Advice
from tests.kd import by_hand, detecting, fake

CANVAS = (64, 88)


def scene(boxes: int = 2) -> tuple[Taps, Taps, fake.Batch]:
    return fake.taps(2, 1, canvas=CANVAS), fake.taps(2, 2, canvas=CANVAS), fake.batch(2, boxes, canvas=CANVAS)


@pytest.mark.parametrize("where", ["objects", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_divergence_of_softened_classes(where: str, temperature: float) -> None:
    student, teacher, batch = scene()
    batch = replace(batch, geometry=replace(batch.geometry, sizes=torch.tensor([[64, 88], [40, 60]])))
    detector = fake.FakeDetector()
    mine, its = (detector.predict(x.pyramid, batch.geometry) for x in (student, teacher))
    positive = detector.answers(mine, batch).positive.tolist()
    expected = 0.0
    for place, cell in enumerate(by_hand.cells(mine.class_logits)):
        image, level, row, column = cell
        on_image = all(
            (i + 0.5) * fake.STRIDES[level] < size
            for i, size in zip((row, column), batch.geometry.sizes[image].tolist(), strict=True)
        )
        if positive[place] or (where == "all" and on_image):
            pairs = zip(by_hand.at(its.class_logits, cell), by_hand.at(mine.class_logits, cell), strict=True)
            expected += sum(temperature**2 * by_hand.coin(t / temperature, s / temperature) for t, s in pairs)
    config = hinton.Config(temperature=temperature, where=where)  # pyright: ignore[reportArgumentType]
    found = fake.run(hinton.Loss(config, fake.pair()), student, teacher, batch, detector)
    assert found["cls"].item() == pytest.approx(expected / float(batch.totals["positives"]), rel=1e-5)
    assert expected > 0


def regions() -> tuple[faster_rcnn.FasterRCNN, Outputs, Outputs, fake.Batch]:
    """Two answers about the same regions: on objects, beside them, and of an image without objects."""
    detector = detecting.detector(faster_rcnn)
    assert isinstance(detector, faster_rcnn.FasterRCNN)
    batch = detecting.counted(detector, detecting.batch([[[10.0, 10, 40, 50]], []]))
    proposals = (torch.tensor([[10.0, 10, 40, 48], [0, 0, 9, 9]]), torch.tensor([[5.0, 5, 60, 60]]))
    draw = torch.Generator().manual_seed(3)
    said = [torch.randn(3, detecting.CLASSES + 1, generator=draw) for _ in range(2)]
    deltas = torch.randn(3, 4 * (detecting.CLASSES + 1), generator=draw)
    mine, its = (Outputs((), (), (), proposals, logits, deltas) for logits in said)
    return detector, mine, its, batch


@pytest.mark.parametrize("where", ["objects", "all"])
def test_of_regions_it_compares_whole_distributions(where: str) -> None:
    detector, mine, its, batch = regions()
    assert mine.roi_logits is not None
    assert its.roi_logits is not None
    counted = [0] if where == "objects" else [0, 1, 2]
    expected = 0.0
    for region in counted:
        t, s = (by_hand.softmax((x[region].double() / 2).tolist()) for x in (its.roi_logits, mine.roi_logits))
        expected += 4 * by_hand.kl(t, s)
    config = hinton.Config(where=where)  # pyright: ignore[reportArgumentType]
    method = hinton.Loss(config, fake.pair(detector.shapes, detector.shapes))
    found = method.losses(Taps(), mine, Taps(), batch, Advice(detector, ask=lambda: its))["cls"]
    assert found.item() == pytest.approx(expected / (2 * detector.config.roi_samples), rel=1e-5)


def test_without_objects_it_is_silent_and_the_teacher_gets_no_gradient() -> None:
    student, teacher, batch = scene(boxes=0)
    assert fake.run(hinton.Loss(hinton.Config(), fake.pair()), student, teacher, batch)["cls"] == 0
    detector, mine, its, some = regions()
    assert its.roi_logits is not None
    assert mine.roi_logits is not None
    for x in (its.roi_logits, mine.roi_logits):
        x.requires_grad_()
    method = hinton.Loss(hinton.Config(), fake.pair(detector.shapes, detector.shapes))
    method.losses(Taps(), mine, Taps(), some, Advice(detector, ask=lambda: its))["cls"].backward()
    assert its.roi_logits.grad is None
    assert mine.roi_logits.grad is not None


def test_settings_and_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0"):
        hinton.Config(temperature=0)
    other = replace(fake.SHAPES, places=("retinanet", "anchors"))
    with pytest.raises(ValueError, match=r"hinton compares.*student's places are fake.*teacher's retinanet"):
        hinton.Loss(hinton.Config(), fake.pair(teacher=other))
