"""What every detector promises, and every new file in the folder with it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from data_sharding.batch import Geometry, Outputs
from kd.backbones import mobilenetv2
from kd.blocks.align import align
from tests.kd import perfect, runs
from tests.kd.detecting import (
    SOME,
    batch,
    cells_on_image,
    counted,
    detector,
    every_detector,
    every_one_stage,
    name_of,
    outputs_of,
    part_of,
    seen_by,
    total,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these maps are too small to share
    yield
    torch.set_num_threads(threads)


@every_detector
@pytest.mark.parametrize("boxes", [[[], []], SOME, [[[64.0, 64, 65, 65]], []]], ids=["no boxes", "boxes", "one pixel"])
@pytest.mark.parametrize("levels", [(2, 3, 4), (3, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7)])
def test_gradient_reaches_every_parameter(module: ModuleType, boxes: list, levels: tuple[int, ...]) -> None:
    d = detector(module, levels=levels)
    b = counted(d, batch(boxes))
    losses = d.task_losses(outputs_of(d, b), b)
    assert {"cls", "box"} <= set(losses)
    assert all(torch.isfinite(v) for v in losses.values())
    total(losses).backward()
    assert [n for n, p in d.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    if boxes[0]:
        assert b.totals["positives"] >= sum(len(x) for x in boxes), "no box without anybody who answers for it"


@every_detector
@pytest.mark.parametrize("canvas", [(128, 256), (65, 97)])
def test_maps_have_ceil_sizes_of_the_declared_strides(module: ModuleType, canvas: tuple[int, int]) -> None:
    d = detector(module, levels=(2, 3, 4, 5, 6, 7))
    b = batch([[]], canvas)
    outputs = seen_by(d, b)
    assert d.shapes.strides == (4, 8, 16, 32, 64, 128)
    for maps in filter(None, (outputs.class_logits, outputs.box_deltas, outputs.centerness)):
        cells = [(math.ceil(canvas[0] / stride), math.ceil(canvas[1] / stride)) for stride in d.shapes.strides]
        assert [tuple(m.shape[-2:]) for m in maps] == cells
    assert len(d.detect(outputs, b.geometry)) == 1


@every_detector
def test_a_batch_of_two_is_the_sum_of_its_images(module: ModuleType) -> None:
    """Losses of the task and of distillation, and their gradients, as shares of the whole."""
    d, teacher = detector(module).double(), detector(module).double()
    ignore = (torch.tensor([[50.0, 50, 80, 80]]), torch.zeros(0, 4))
    b = counted(d, batch(SOME, ignore=ignore))
    found = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        d.zero_grad()
        losses = [_all_losses(d, teacher, part_of(b, keep)) for keep in parts]
        sums = {name: torch.stack([one[name] for one in losses]).sum() for name in losses[0]}
        total(sums).backward()
        found.append((sums, [p.grad for p in d.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def _all_losses(d: Any, teacher: Any, part: Any) -> dict[str, torch.Tensor]:
    # Double precision up to the outputs: at a kink of a ReLU6 float32 noise would turn a gradient on or off.
    images = d.normalise(part.images, part.geometry).double()
    outputs = d.predict(d.features(images).pyramid, part.geometry, sampling=part)
    target = teacher.predict(teacher.features(images).pyramid, part.geometry, proposals=outputs.proposals or None)
    losses = d.task_losses(outputs, part)
    for kind in ("bounded", "smooth_l1"):
        losses |= {f"{kind}/{k}": v for k, v in d.distill_losses(outputs, target.detach(), part, kind).items()}
    return losses


@every_detector
def test_nothing_on_the_padding_is_taught_or_found(module: ModuleType) -> None:
    d = detector(module)
    small = Geometry((128, 128), torch.tensor([[70, 90]]))
    b = counted(d, batch([[[80.0, 60, 90, 70]]], geometry=small))
    outputs = outputs_of(d, b)
    on_image = cells_on_image(d, small)
    maps = [tuple(m.detach().clone().requires_grad_() for m in x) for x in (outputs.class_logits, outputs.box_deltas)]
    changed = replace(outputs, class_logits=maps[0], box_deltas=maps[1])
    total(d.task_losses(changed, b) | d.distill_losses(changed, d_other(d, b), b, "smooth_l1")).backward()
    for m, inside in zip(maps[0] + maps[1], on_image * 2, strict=True):
        assert m.grad is not None
        assert (m.grad[0][:, ~inside] == 0).all()
    assert any(
        (m.grad[0][:, inside] != 0).any() for m, inside in zip(maps[0], on_image, strict=True) if m.grad is not None
    )
    said = [
        tuple(torch.where(inside, m + 4, noise) for m, inside in zip(outputs.class_logits, on_image, strict=True))
        for noise in (-20.0, 20.0)
    ]
    quiet, loud = (perfect.found(d, replace(outputs, class_logits=maps), small)[0] for maps in said)
    assert len(quiet) > 0
    assert torch.equal(quiet, loud)


def d_other(d: Any, b: Any) -> Outputs:
    """Another opinion on the same batch, on the same proposals."""
    other = seen_by(d, b)
    proposals = outputs_of(d, b).proposals
    if proposals:
        other = d.predict(
            tuple(x + 1 for x in d.features(d.normalise(b.images, b.geometry)).pyramid), b.geometry, proposals
        )
    return replace(other, class_logits=tuple(m + 1 for m in other.class_logits)).detach()


@every_one_stage
def test_ignored_regions_drop_negatives_and_keep_positives(module: ModuleType) -> None:
    d = detector(module)
    region = torch.tensor([[0.0, 0, 64, 64]])
    free, ignoring = (counted(d, batch([[SOME[0][0]]], ignore=(r,))) for r in (torch.zeros(0, 4), region))
    outputs = outputs_of(d, free)
    assert free.totals["positives"] == ignoring.totals["positives"] > 0
    a, b = d.task_losses(outputs, free), d.task_losses(outputs, ignoring)
    assert b["cls"] < a["cls"]
    assert torch.equal(a["box"], b["box"])


@every_detector
def test_where_everything_is_ignored_nothing_is_learnt(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch([[]], ignore=(torch.tensor([[0.0, 0, 128, 128]]),)))
    assert total(d.task_losses(outputs_of(d, b), b)) == 0


@every_detector
def test_perfect_outputs_are_detected_where_the_boxes_are(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch(SOME))
    outputs = perfect.outputs(d, b)
    assert d.task_losses(outputs, b)["box"] == pytest.approx(0, abs=1e-5)
    for found, boxes, labels in zip(d.detect(outputs, b.geometry), b.boxes, b.labels, strict=True):
        assert len(found.boxes) == len(boxes)
        overlap = box_iou(boxes, found.boxes)
        assert (overlap.amax(1) > 0.999).all()
        assert torch.equal(found.labels[overlap.argmax(1)], labels)


@every_detector
def test_detections_are_clipped_capped_sorted_and_of_positive_area(module: ModuleType) -> None:
    d = detector(module, detections=7, score_threshold=0.0, nms=1.0)
    geometry = Geometry((128, 128), torch.tensor([[100, 60], [128, 128]]))
    outputs = seen_by(d, batch([[], []], geometry=geometry))
    wild = replace(outputs, box_deltas=tuple(m * 50 + 1 for m in outputs.box_deltas))
    for found, (height, width) in zip(d.detect(wild, geometry), geometry.sizes.tolist(), strict=True):
        assert len(found.boxes) == len(found.scores) == len(found.labels) == 7
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert set(found.labels.tolist()) <= set(range(d.shapes.num_classes))


@every_detector
def test_bounded_box_loss_is_silent_where_the_student_is_better(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch(SOME))
    right, wrong = perfect.outputs(d, b), perfect.outputs(d, b, shift=0.5)
    assert d.distill_losses(right, wrong, b, "bounded")["box"] == pytest.approx(0, abs=1e-9)
    # four numbers, each half a unit off, at every positive: 4 * 0.25 per positive, and smooth l1 half of that
    bounded, smooth = (d.distill_losses(wrong, right, b, kind)["box"] for kind in ("bounded", "smooth_l1"))
    assert bounded == pytest.approx(perfect.unit(d, b), rel=1e-5)
    assert smooth == pytest.approx(bounded.item() / 2, rel=1e-5)
    assert d.distill_losses(wrong, wrong, b, "smooth_l1")["box"] == 0
    with pytest.raises(ValueError, match="bounded"):
        d.distill_losses(wrong, wrong, b, "l3")


@every_detector
def test_soft_classes_pull_towards_the_target_only(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch([[], []]))
    outputs = outputs_of(d, b)
    target = d_other(d, b)
    other = replace(outputs, class_logits=target.class_logits, roi_logits=target.roi_logits).detach()
    assert d.distill_losses(outputs, target, b, "bounded")["cls"] > 1e-4
    leaves = [m.clone().requires_grad_() for m in other.class_logits]
    at_target = replace(other, class_logits=tuple(leaves))
    found = d.distill_losses(at_target, target, b, "bounded")["cls"]
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert all(m.grad is not None and m.grad.abs().max() < 1e-6 for m in leaves)
    assert not any(p.grad is not None for p in d.parameters())


@every_detector
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_frozen_backbone_moves_neither_weights_nor_statistics(module: ModuleType, norm: Any) -> None:
    d = detector(module, backbone=mobilenetv2.Config(width_mult=0.1, norm=norm)).train()
    b = counted(d, batch(SOME))
    before = {k: v.clone() for k, v in d.backbone.state_dict().items()}
    taps = d.features(d.normalise(b.images, b.geometry), freeze_backbone=True)
    total(d.task_losses(d.predict(taps.pyramid, b.geometry, sampling=b), b)).backward()
    assert all(p.grad is None for p in d.backbone.parameters())
    assert all(p.grad is not None for n, p in d.named_parameters() if not n.startswith("backbone."))
    assert all(torch.equal(v, before[k]) for k, v in d.backbone.state_dict().items())
    assert d.backbone.training


@every_detector
def test_losses_are_float32_and_close_under_bf16(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch(SOME))
    exact = d.task_losses(outputs_of(d, b), b)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(d, b)
        assert outputs.class_logits[0].dtype == torch.bfloat16
        rounded = d.task_losses(outputs, b) | d.distill_losses(outputs, outputs, b, "bounded")
        d.detect(outputs, b.geometry)
    assert all(v.dtype == torch.float32 for v in rounded.values())
    assert rounded["box"] == 0
    for name in exact.keys() - {"box"}:
        torch.testing.assert_close(d.task_losses(outputs, b)[name], exact[name], rtol=0.05, atol=0.02)


@every_detector
def test_outputs_of_another_canvas_are_refused(module: ModuleType) -> None:
    d = detector(module)
    b = counted(d, batch([[]], (128, 128)))
    with pytest.raises(ValueError, match="was the pyramid aligned"):
        d.task_losses(outputs_of(d, batch([[]], (128, 256))), b)


@every_detector
def test_a_doubled_teachers_head_speaks_in_the_students_pixels(module: ModuleType) -> None:
    """On the shifted pyramid, with the student's proposals where there are any."""
    exact = {} if name_of(module) == "fcos" else {"whole_pixels": False}
    student, teacher = (detector(module, levels=levels, **exact).eval() for levels in ((2, 3, 4), (3, 4, 5)))
    b, doubled = batch([[]]), batch([[]], (256, 256))
    with torch.no_grad():
        seen = teacher.features(teacher.normalise(doubled.images, doubled.geometry))
        proposals = seen_by(student, b).proposals
        large = tuple(2 * p for p in proposals)
        there = teacher.predict(seen.pyramid, doubled.geometry, proposals=large or None)
        aligned = align(seen, teacher.shapes, student.shapes, 2).pyramid
        mine = teacher.on_grid(student.shapes.strides)
        here = mine.predict(aligned, b.geometry, proposals=proposals or None)
        loud = [replace(o, class_logits=tuple(m + 4 for m in o.class_logits)) for o in (there, here)]
        found, wanted = mine.detect(loud[1], b.geometry)[0], teacher.detect(loud[0], doubled.geometry)[0]
    assert len(found.boxes) > 3
    torch.testing.assert_close(2 * found.boxes, wanted.boxes, rtol=1e-3, atol=1e-2)
    assert teacher.shapes.strides == (8, 16, 32)
    with pytest.raises(ValueError, match="knows 3 levels"):
        teacher.on_grid((4, 8))


@every_detector
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"levels": (3, 5)}, "consecutive"),
        ({"levels": ()}, "consecutive"),
        ({"levels": (1, 2)}, r"within 2\.\.7"),
        ({"levels": (6, 7)}, "begin at 5"),
        ({"width": 0}, "width"),
        ({"detections": 0}, "detections"),
        ({"nms": 1.5}, "nms"),
        ({"std": (0.0, 1.0, 1.0)}, "std"),
    ],
)
def test_settings_are_checked(module: ModuleType, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.Config(**setting)


@every_detector
def test_overfitting_one_image_finds_its_objects(module: ModuleType) -> None:
    canvas = torch.full((1, 3, 64, 64), 30, dtype=torch.uint8)
    boxes = [[8.0, 8, 20, 20], [36.0, 10, 56, 30], [20.0, 40, 28, 46]]
    for (x1, y1, x2, y2), colour in zip(boxes, (0, 1, 2), strict=True):
        canvas[0, colour, int(y1) : int(y2), int(x1) : int(x2)] = 250
    d = runs.detector(0, name=name_of(module), levels=(2, 3, 4), **perfect.FIT.get(name_of(module), {}))
    b = counted(d, batch([boxes], (64, 64), images=canvas))
    optimizer = torch.optim.AdamW(d.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total(d.task_losses(outputs_of(d, b), b)).backward()
        optimizer.step()
    found = d.eval().detect(seen_by(d, b), b.geometry)[0]
    best = box_iou(b.boxes[0], found.boxes[:3])
    assert (best.amax(1) > 0.5).all()
    assert torch.equal(found.labels[:3][best.argmax(1)], b.labels[0])
