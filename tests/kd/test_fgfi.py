"""FGFI against its equations in loops, and its mask."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Taps
from data_sharding.codecs.foreground import foreground_cells
from kd.blocks.imitation import anchor_masks
from kd.methods.fgfi import Config, Loss
from tests.kd import fake

BOXES = (
    torch.tensor([[4.0, 4.0, 20.0, 30.0], [50.0, 10.0, 90.0, 80.0]]),
    torch.tensor([[101.0, 33.0, 106.0, 38.0], [0.0, 60.0, 136.0, 96.0], [8.0, 8.0, 40.0, 40.0]]),
)
"""Two images; one box is smaller than a cell, one wider than everything, one equals a set of cells."""
SIZES, RATIOS = (4.0, 5.0), (0.5, 1.0)


def labelled() -> Batch:
    return replace(fake.batch(2), boxes=BOXES)


def masks_in_loops(phi: float) -> list[list[set[tuple[int, int]]]]:
    """Per level and image the imitated (row, column)s, straight from eq. 1-2 and the enlarged boxes."""
    masks = [[set[tuple[int, int]]() for _ in BOXES] for _ in fake.STRIDES]
    for i, boxes in enumerate(BOXES):
        for box in boxes.tolist():
            overlap = {
                (level, row, column): best_iou(box, (column + 0.5) * stride, (row + 0.5) * stride, stride)
                for level, stride in enumerate(fake.STRIDES)
                for row in range(math.ceil(fake.CANVAS[0] / stride))
                for column in range(math.ceil(fake.CANVAS[1] / stride))
                if near(box, row, column, stride)
            }
            for (level, row, column), iou in overlap.items():
                if iou > phi * max(overlap.values()):
                    masks[level][i].add((row, column))
    return masks


def best_iou(box: list[float], x: float, y: float, stride: int) -> float:
    found = []
    for size in SIZES:
        for ratio in RATIOS:
            w, h = size * stride / math.sqrt(ratio), size * stride * math.sqrt(ratio)
            across = min(box[2], x + w / 2) - max(box[0], x - w / 2)
            down = min(box[3], y + h / 2) - max(box[1], y - h / 2)
            shared = max(across, 0) * max(down, 0)
            found.append(shared / (w * h + (box[2] - box[0]) * (box[3] - box[1]) - shared))
    return max(found)


def near(box: list[float], row: int, column: int, stride: int) -> bool:
    """The cell shares area with the box made 1.2 times as large."""
    w, h = (box[2] - box[0]) / 10, (box[3] - box[1]) / 10
    across = box[0] - w < (column + 1) * stride and box[2] + w > column * stride
    return across and box[1] - h < (row + 1) * stride and box[3] + h > row * stride


def masks(batch: Batch, phi: float = 0.5, sizes: tuple[float, ...] = SIZES) -> list[Tensor]:
    shapes = [(len(batch), *x.shape[2:]) for x in fake.taps(1, 1).pyramid]
    return anchor_masks(batch, [(b, h, w) for b, h, w in shapes], fake.STRIDES, sizes, RATIOS, phi, 1.2)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_mask_is_the_papers_within_reach_of_the_box(phi: float) -> None:
    for found, expected in zip(masks(labelled(), phi), masks_in_loops(phi), strict=True):
        assert [set(map(tuple, image.nonzero().tolist())) for image in found] == expected


def test_each_object_is_imitated_on_the_levels_of_its_size() -> None:
    small = replace(fake.batch(1), boxes=(torch.tensor([[40.0, 40.0, 50.0, 50.0]]),))
    large = replace(fake.batch(1), boxes=(torch.tensor([[10.0, 0.0, 120.0, 96.0]]),))
    assert [bool(mask.any()) for mask in masks(small)] == [True, False, False]
    assert [bool(mask.any()) for mask in masks(large)] == [False, True, True]


def test_the_least_objects_are_imitated_where_they_are_and_nowhere_else() -> None:
    """Every anchor that holds a box of a pixel has the same IoU with it, up to two cells away."""
    dot = replace(fake.batch(1), boxes=(torch.tensor([[44.0, 44.0, 45.0, 45.0]]),))
    assert masks(dot)[0][0].nonzero().tolist() == [[5, 5]]


def test_the_loss_is_half_the_squared_error_at_imitated_positions_by_their_number() -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), labelled()
    method = Loss(Config(anchor_sizes=SIZES, anchor_ratios=RATIOS), fake.pair())
    expected, by_level = 0.0, masks_in_loops(0.5)
    for i in range(2):
        count = sum(len(images[i]) for images in by_level)
        for s, t, images in zip(student.pyramid, teacher.pyramid, by_level, strict=True):
            for row, column in images[i]:
                pairs = zip(s.double()[i, :, row, column].tolist(), t.double()[i, :, row, column].tolist(), strict=True)
                expected += sum((a - b) ** 2 for a, b in pairs) / (2 * count) / 2
    assert fake.run(method, student, teacher, batch)["feat"].item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_of_the_imitated_positions_and_draws_the_student_to_the_teacher() -> None:
    batch, teacher = labelled(), fake.taps(2, 2)
    student = fake.require_grad(fake.taps(2, 1))
    fake.run(Loss(Config(anchor_sizes=SIZES, anchor_ratios=RATIOS), fake.pair()), student, teacher, batch)[
        "feat"
    ].backward()
    for s, t, mask in zip(student.pyramid, teacher.pyramid, masks(batch), strict=True):
        # The adapter starts as the identity, so the gradient is (s - t) by the same positive number in each image.
        assert s.grad is not None
        where = mask[:, None].expand_as(s)
        assert torch.equal(s.grad != 0, where & (s != t))
        assert ((s.grad * (s - t))[where] > 0).all()


@pytest.mark.parametrize("reach", [1.0, 1.2, 1.37])
def test_the_mask_lies_within_what_a_sparse_cache_holds_to_the_cell(reach: float) -> None:
    """Also where an enlarged box ends on a cell's border, which rounding could cross."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 60, (300, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + torch.randint(1, 36, (300, 2), generator=generator)], dim=1)
    for one in boxes[:, None]:
        batch = replace(fake.batch(1), boxes=(one,))
        shapes = [(1, x.shape[2], x.shape[3]) for x in fake.taps(1, 1).pyramid]
        found = anchor_masks(batch, shapes, fake.STRIDES, SIZES, RATIOS, 0.0, reach)
        held = foreground_cells(batch.boxes, fake.CANVAS, fake.STRIDES, reach)
        assert all((mask <= kept).all() for mask, kept in zip(found, held, strict=True))
        assert any(mask.any() for mask in found)


def test_an_image_without_objects_adds_nothing_but_is_counted() -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), labelled()
    method = Loss(Config(), fake.pair())
    both = fake.run(method, student, teacher, replace(batch, boxes=(BOXES[0], torch.zeros(0, 4))))["feat"]
    one = fake.run(method, fake.rows(student, [0]), fake.rows(teacher, [0]), replace(fake.batch(1), boxes=BOXES[:1]))
    torch.testing.assert_close(both, one["feat"] / 2)


def test_the_adapter_is_a_convolution_of_3x3_that_learns() -> None:
    method = Loss(Config(), fake.pair(teacher=fake.wider()))
    fake.run(method, fake.taps(2, 1), fake.taps(2, 2, fake.wider()), fake.batch(2))["feat"].backward()
    sizes = [p.shape[-1] for p in method.parameters() if p.ndim == 4]
    assert sizes == [3, 3, 3]
    assert all(p.grad is not None for p in method.parameters())


def test_channels_last_taps_give_the_same() -> None:
    """A cache's maps lie channels last."""
    student, teacher, method = fake.taps(2, 1), fake.taps(2, 2), Loss(Config(), fake.pair())
    turned = Taps(None, tuple(x.to(memory_format=torch.channels_last) for x in teacher.pyramid))
    assert fake.run(method, student, teacher, labelled()) == fake.run(method, student, turned, labelled())


@pytest.mark.parametrize(
    "settings", [{"enlarged": 0.9}, {"phi": 1.0}, {"phi": -0.1}, {"anchor_sizes": ()}, {"anchor_ratios": (0.0,)}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"enlarged must be|phi must be in|must be one or more numbers above 0"):
        Config(**settings)  # pyright: ignore[reportArgumentType]
