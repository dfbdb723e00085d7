import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import box_iou

from data_sharding.batch import Batch, Geometry, Outputs
from kd.backbones import mobilenetv2, resnet
from kd.blocks import points as pts
from kd.detectors import fcos

TINY = fcos.Config(width=16, head_depth=1, backbone=mobilenetv2.Config(width_mult=0.1))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these maps are too small to share
    yield
    torch.set_num_threads(threads)


def detector(**changes: object) -> fcos.FCOS:
    return fcos.build(replace(TINY, **changes), num_classes=3)  # pyright: ignore[reportArgumentType]


def batch(boxes: list[list[list[float]]], canvas: tuple[int, int] = (128, 128), **rest: object) -> Batch:
    """Noise images with the given boxes; labels 0, 1, 2, 0, ..."""
    count = len(boxes)
    images = torch.randint(0, 256, (count, 3, *canvas), dtype=torch.uint8)
    made = Batch(
        images,
        Geometry(canvas, torch.tensor([canvas] * count)),
        tuple(torch.tensor(b).reshape(-1, 4) for b in boxes),
        tuple(torch.arange(len(b)) % 3 for b in boxes),
        tuple(torch.zeros(0, 4) for _ in boxes),
        tuple(range(count)),
        (0,) * count,
    )
    return replace(made, **rest)  # pyright: ignore[reportArgumentType]


def counted(d: fcos.FCOS, b: Batch) -> Batch:
    return b.with_totals({"images": torch.tensor(float(len(b))), **d.counts(b)})


def outputs_of(d: fcos.FCOS, b: Batch) -> Outputs:
    return d.predict(d.features(d.normalise(b.images, b.geometry)).pyramid, b.geometry)


SOME = [[[10.0, 10, 40, 50], [60, 60, 66, 65]], [[0.0, 0, 120, 120]]]


@pytest.mark.parametrize("boxes", [[[], []], SOME], ids=["no boxes", "boxes"])
@pytest.mark.parametrize("levels", [(2, 3, 4), (3, 4, 5, 6, 7), (5, 6), (2, 3, 4, 5, 6, 7)])
def test_gradient_reaches_every_parameter(boxes: list, levels: tuple[int, ...]) -> None:
    d = detector(levels=levels)
    b = counted(d, batch(boxes))
    losses = d.task_losses(outputs_of(d, b), b)
    assert set(losses) == {"cls", "box", "centerness"}
    assert all(torch.isfinite(v) for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in d.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@pytest.mark.parametrize("canvas", [(128, 256), (65, 97)])
def test_maps_have_ceil_sizes_of_the_declared_strides(canvas: tuple[int, int]) -> None:
    d = detector(levels=(2, 3, 4, 5, 6, 7))
    b = batch([[]], canvas)
    outputs = outputs_of(d, b)
    assert d.shapes.strides == (4, 8, 16, 32, 64, 128)
    for stride, *maps in zip(
        d.shapes.strides, outputs.class_logits, outputs.box_deltas, outputs.centerness, strict=True
    ):
        cells = (math.ceil(canvas[0] / stride), math.ceil(canvas[1] / stride))
        assert [tuple(m.shape) for m in maps] == [(1, c, *cells) for c in (3, 4, 1)]
    assert len(d.detect(outputs, b.geometry)) == 1


def torchvisions() -> tuple[torch.nn.Module, fcos.FCOS]:
    theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    config = fcos.Config(backbone=resnet.Config(depth=50, norm="batch"), nearest=False, score_threshold=0.2)
    ours = fcos.build(config, 5, weights_follow=True)
    # A spread in the logits, so that some scores pass and rounding of the random network does not.
    torch.nn.init.normal_(theirs.head.classification_head.cls_logits.weight, std=0.05)
    theirs.head.classification_head.cls_logits.bias.data.fill_(-2)
    keys = ours.load_state_dict(fcos.from_torchvision(theirs.state_dict()), strict=False)
    assert not keys.unexpected_keys
    assert all(k.endswith("num_batches_tracked") for k in keys.missing_keys)
    return theirs, ours.eval()


def test_with_torchvisions_weights_it_is_torchvisions_detector() -> None:
    theirs, ours = torchvisions()
    b = batch([[[10.0, 12, 47.3, 50], [60.2, 60, 90, 75.5], [3.1, 20, 120, 111]], []])
    images = ours.normalise(b.images, b.geometry)
    with torch.no_grad():
        pyramid = list(theirs.backbone(images).values())  # pyright: ignore
        wanted = theirs.head(pyramid)  # pyright: ignore
        outputs = ours.predict(ours.features(images).pyramid, b.geometry)
        points = ours._points(b.geometry)
        for found, key in zip(
            fcos._flat(outputs, points), ("cls_logits", "bbox_regression", "bbox_ctrness"), strict=True
        ):
            torch.testing.assert_close(found, wanted[key].reshape(found.shape), rtol=1e-3, atol=1e-4)
        anchors = torch.cat([points.xy - points.stride[:, None] / 2, points.xy + points.stride[:, None] / 2], dim=1)
        targets = [{"boxes": x, "labels": y} for x, y in zip(b.boxes, b.labels, strict=True)]
        cells = [h * w for h, w in points.shapes]
        theirs_losses = theirs.compute_loss(targets, wanted, [anchors, anchors], cells)  # pyright: ignore
        losses = ours.task_losses(outputs, counted(ours, b))
    for name, key in (("cls", "classification"), ("box", "bbox_regression"), ("centerness", "bbox_ctrness")):
        torch.testing.assert_close(losses[name], theirs_losses[key], rtol=1e-4, atol=1e-5)


def test_detections_are_torchvisions() -> None:
    theirs, ours = torchvisions()
    b = batch([[], []])
    with torch.no_grad():
        outputs = outputs_of(ours, b)
        points = ours._points(b.geometry)
        logits, distances, centerness = fcos._flat(outputs, points)
        cells = [h * w for h, w in points.shapes]
        flat = {"cls_logits": logits, "bbox_regression": distances + 0.5, "bbox_ctrness": centerness[..., None]}
        flat = {k: list(v.split(cells, dim=1)) for k, v in flat.items()}
        anchors = torch.cat([points.xy - points.stride[:, None] / 2, points.xy + points.stride[:, None] / 2], dim=1)
        wanted = theirs.postprocess_detections(flat, [list(anchors.split(cells))] * 2, [(128, 128)] * 2)  # pyright: ignore
        found = ours.detect(replace(outputs, box_deltas=tuple(x + 0.5 for x in outputs.box_deltas)), b.geometry)
    for ours_one, theirs_one in zip(found, wanted, strict=True):
        assert len(ours_one.scores) > 20
        torch.testing.assert_close(ours_one.scores, theirs_one["scores"])
        torch.testing.assert_close(ours_one.boxes, theirs_one["boxes"])
        assert torch.equal(ours_one.labels, theirs_one["labels"])


def shares(d: fcos.FCOS, b: Batch, target: Outputs | None, keep: slice) -> dict[str, Tensor]:
    """All loss terms of some of the images, as shares of the whole batch."""
    part = replace(
        b,
        images=b.images[keep],
        geometry=Geometry(b.geometry.canvas, b.geometry.sizes[keep]),
        boxes=b.boxes[keep],
        labels=b.labels[keep],
        ignore=b.ignore[keep],
        image_ids=b.image_ids[keep],
        views=b.views[keep],
    )
    # Double precision up to the outputs: at a kink of a ReLU6 float32 noise would turn a gradient on or off.
    outputs = d.predict(d.features(d.normalise(part.images, part.geometry).double()).pyramid, part.geometry)
    losses = d.task_losses(outputs, part)
    if target is not None:
        cut = Outputs(*(tuple(m[keep] for m in maps) for maps in vars(target).values()))
        for kind in ("bounded", "smooth_l1"):
            losses |= {f"{kind}/{k}": v for k, v in d.distill_losses(outputs, cut, part, kind).items()}
    return losses


def test_a_batch_of_two_is_the_sum_of_its_images() -> None:
    d, teacher = detector(), detector()
    ignore = (torch.tensor([[50.0, 50, 80, 80]]), torch.zeros(0, 4))
    b = counted(d, batch(SOME, ignore=ignore))
    target = Outputs(*(tuple(m.detach() for m in maps) for maps in vars(outputs_of(teacher, b)).values()))
    gradients = []
    d.double()
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        d.zero_grad()
        found = [shares(d, b, target, keep) for keep in parts]
        sums = {name: sum(f[name] for f in found) for name in found[0]}
        sum(sums.values()).backward()  # pyright: ignore
        gradients.append((sums, [p.grad for p in d.parameters()]))
    for name, value in gradients[0][0].items():
        torch.testing.assert_close(value, gradients[1][0][name], rtol=1e-5, atol=1e-6)
    for one, two in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_nothing_on_the_padding_is_positive_or_counts() -> None:
    d = detector()
    small = Geometry((128, 128), torch.tensor([[70, 90]]))
    b = counted(d, batch([[[80.0, 60, 90, 70]]], geometry=small))
    outputs = outputs_of(d, b)
    points = d._points(small)
    outside = ~points.inside_images(small.sizes)[0]
    logits = [m.detach().clone().requires_grad_() for m in outputs.class_logits]
    d.task_losses(replace(outputs, class_logits=tuple(logits)), b)["cls"].backward()
    gradient = torch.cat([m.grad.flatten(2) for m in logits], dim=2)[0]  # pyright: ignore
    assert (gradient[:, outside] == 0).all()
    assert (gradient[:, ~outside] != 0).all()


def test_ignored_regions_drop_negatives_and_keep_positives() -> None:
    d = detector()
    box, region = [10.0, 10, 40, 50], torch.tensor([[0.0, 0, 64, 64]])
    free, ignoring = (counted(d, batch([[box]], ignore=(r,))) for r in (torch.zeros(0, 4), region))
    outputs = outputs_of(d, free)
    assert free.totals["positives"] == ignoring.totals["positives"] > 0
    a, b = d.task_losses(outputs, free), d.task_losses(outputs, ignoring)
    assert b["cls"] < a["cls"]
    assert torch.equal(a["box"], b["box"])
    everywhere = replace(ignoring, ignore=(torch.tensor([[0.0, 0, 128, 128]]),), boxes=(torch.zeros(0, 4),))
    everywhere = counted(d, replace(everywhere, labels=(torch.zeros(0, dtype=torch.int64),)))
    assert d.task_losses(outputs, everywhere)["cls"] == 0


def truth_as_outputs(d: fcos.FCOS, b: Batch, shift: float = 0.0) -> Outputs:
    """Outputs that say of every positive location exactly what the labels say."""
    targets = d._targets(b)
    xy, stride, boxes = targets.of_positives()
    logits = d._one_hot(targets) * 20 - 10
    distances = torch.zeros(*targets.matched.shape, 4)
    distances[targets.positive] = pts.encode(xy, stride, boxes) + shift
    maps = [[] for _ in range(3)]
    start = 0
    for rows, columns in targets.points.shapes:
        for kind, values in enumerate((logits, distances, torch.full_like(logits[..., :1], 5.0))):
            part = values[:, start : start + rows * columns]
            maps[kind].append(part.transpose(1, 2).reshape(len(b), -1, rows, columns))
        start += rows * columns
    return Outputs(*(tuple(m) for m in maps))


def test_perfect_outputs_are_detected_where_the_boxes_are() -> None:
    d = detector()
    b = counted(d, batch(SOME))
    outputs = truth_as_outputs(d, b)
    assert d.task_losses(outputs, b)["box"] == pytest.approx(0, abs=1e-5)
    for found, boxes, labels in zip(d.detect(outputs, b.geometry), b.boxes, b.labels, strict=True):
        assert len(found.boxes) == len(boxes)
        overlap = box_iou(boxes, found.boxes)
        assert (overlap.amax(1) > 0.999).all()
        assert torch.equal(found.labels[overlap.argmax(1)], labels)


def test_detections_are_clipped_capped_sorted_and_of_positive_area() -> None:
    d = detector(detections=7, score_threshold=0.0, nms=1.0)
    geometry = Geometry((128, 128), torch.tensor([[100, 60], [128, 128]]))
    b = batch([[], []], geometry=geometry)
    outputs = outputs_of(d, b)
    outputs = replace(outputs, box_deltas=tuple(m * 50 + 1 for m in outputs.box_deltas))
    for found, (height, width) in zip(d.detect(outputs, geometry), geometry.sizes.tolist(), strict=True):
        assert len(found.boxes) == len(found.scores) == len(found.labels) == 7
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()
        assert (found.scores.diff() <= 0).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_bounded_box_loss_is_silent_where_the_student_is_better() -> None:
    d = detector()
    b = counted(d, batch(SOME))
    perfect, worse = truth_as_outputs(d, b), truth_as_outputs(d, b, shift=0.5)
    assert d.distill_losses(perfect, worse, b, "bounded")["box"] == 0
    # 4 sides, each half a stride off, at every positive: 4 * 0.25 per positive, and smooth l1 half of that
    assert d.distill_losses(worse, perfect, b, "bounded")["box"] == pytest.approx(1.0, rel=1e-5)
    assert d.distill_losses(worse, perfect, b, "smooth_l1")["box"] == pytest.approx(0.5, rel=1e-5)
    assert d.distill_losses(worse, worse, b, "smooth_l1")["box"] == 0
    with pytest.raises(ValueError, match="bounded"):
        d.distill_losses(worse, worse, b, "l3")


def test_soft_classes_pull_towards_the_target_only() -> None:
    d = detector()
    b = counted(d, batch([[], []]))
    outputs, target = outputs_of(d, b), outputs_of(detector(), b)
    at_target = Outputs(target.class_logits, outputs.box_deltas, outputs.centerness)
    leaves = [m.detach().clone().requires_grad_() for m in at_target.class_logits]
    d.distill_losses(replace(at_target, class_logits=tuple(leaves)), target, b, "bounded")["cls"].backward()
    assert all(m.grad is not None and m.grad.abs().max() < 1e-6 for m in leaves)
    assert not any(p.grad is not None for p in d.parameters())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_frozen_backbone_moves_neither_weights_nor_statistics(norm: str) -> None:
    d = detector(backbone=mobilenetv2.Config(width_mult=0.1, norm=norm)).train()  # pyright: ignore
    b = counted(d, batch(SOME))
    before = {k: v.clone() for k, v in d.backbone.state_dict().items()}
    taps = d.features(d.normalise(b.images, b.geometry), freeze_backbone=True)
    losses = d.task_losses(d.predict(taps.pyramid, b.geometry), b)
    sum(losses.values()).backward()  # pyright: ignore
    assert all(p.grad is None for p in d.backbone.parameters())
    assert all(p.grad is not None for n, p in d.named_parameters() if not n.startswith("backbone."))
    assert all(torch.equal(v, before[k]) for k, v in d.backbone.state_dict().items())
    assert d.backbone.training


def test_losses_are_float32_and_close_under_bf16() -> None:
    d = detector()
    b = counted(d, batch(SOME))
    exact = d.task_losses(outputs_of(d, b), b)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(d, b)
        assert outputs.class_logits[0].dtype == torch.bfloat16
        rounded = d.task_losses(outputs, b) | d.distill_losses(outputs, outputs, b, "bounded")
        d.detect(outputs, b.geometry)
    assert all(v.dtype == torch.float32 for v in rounded.values())
    assert rounded["box"] == 0
    for name in ("cls", "centerness"):
        torch.testing.assert_close(d.task_losses(outputs, b)[name], exact[name], rtol=0.05, atol=0.02)


def test_outputs_of_another_canvas_are_refused() -> None:
    d = detector()
    b = counted(d, batch([[]], (128, 128)))
    with pytest.raises(ValueError, match="was the pyramid aligned"):
        d.task_losses(outputs_of(d, batch([[]], (128, 256))), b)


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
        ({"center_radius": 0.0}, "center_radius"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fcos.Config(**setting)  # pyright: ignore[reportArgumentType]


def test_overfitting_one_image_finds_its_objects() -> None:
    canvas = torch.full((1, 3, 64, 64), 30, dtype=torch.uint8)
    boxes = [[8.0, 8, 20, 20], [36.0, 10, 56, 30], [20.0, 40, 28, 46]]
    for (x1, y1, x2, y2), colour in zip(boxes, (0, 1, 2), strict=True):
        canvas[0, colour, int(y1) : int(y2), int(x1) : int(x2)] = 250
    d = detector(width=32, levels=(2, 3, 4))
    b = counted(d, batch([boxes], (64, 64), images=canvas))
    optimizer = torch.optim.AdamW(d.parameters(), lr=4e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.stack(list(d.task_losses(outputs_of(d, b), b).values())).sum().backward()
        optimizer.step()
    found = d.eval().detect(outputs_of(d, b), b.geometry)[0]
    best = box_iou(b.boxes[0], found.boxes[:3])
    assert (best.amax(1) > 0.5).all()
    assert torch.equal(found.labels[:3][best.argmax(1)], b.labels[0])
