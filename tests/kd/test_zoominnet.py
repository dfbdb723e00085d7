"""ZoomInNet: its key points and its loss against loops, and what aligns its doubled teacher."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Outputs
from kd.blocks.align import align, level_shift
from kd.blocks.key_points import best_scores, object_bumps, strongest
from kd.methods.base import Advice
from kd.methods.zoominnet import Config, Loss
from tests.kd import fake

BOXES = (torch.tensor([[4.0, 4.0, 20.0, 30.0], [50.0, 10.0, 90.0, 80.0]]), torch.tensor([[101.0, 33.0, 103.0, 34.0]]))


def labelled() -> Batch:
    return replace(fake.batch(2), boxes=BOXES)


def bump(boxes: Tensor, row: int, column: int, stride: int) -> float:
    """The greatest Gaussian of the boxes that a cell meets, at its centre."""
    found, x, y = [0.0], (column + 0.5) * stride, (row + 0.5) * stride
    for x1, y1, x2, y2 in boxes.tolist():
        if x1 < x + stride / 2 and x2 > x - stride / 2 and y1 < y + stride / 2 and y2 > y - stride / 2:
            across = (x - (x1 + x2) / 2) / max((x2 - x1) / 4, stride / 2)
            down = (y - (y1 + y2) / 2) / max((y2 - y1) / 4, stride / 2)
            found.append(math.exp(-(across**2 + down**2) / 2))
    return max(found)


def outputs(seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    maps = tuple(torch.randn(2, 6, *x.shape[2:], generator=generator) for x in fake.taps(1, 1).pyramid)
    return Outputs(maps, maps)


@pytest.mark.parametrize("points", [5, 40, 10_000])
def test_the_loss_is_the_error_at_the_key_points_by_their_weights(points: int) -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), labelled()
    mine, its = outputs(3), outputs(4)
    expected = 0.0
    for i in range(2):
        found: list[tuple[float, float]] = []
        for level, stride in enumerate(fake.STRIDES):
            a, b = (x.class_logits[level][i].double().sigmoid().amax(dim=0) for x in (mine, its))
            error = (student.pyramid[level][i].double() - teacher.pyramid[level][i].double()).square().mean(dim=0)
            for row in range(a.shape[0]):
                for column in range(a.shape[1]):
                    weight = abs((a - b)[row, column].item()) * bump(BOXES[i], row, column, stride)
                    found.append((weight, error[row, column].item()))
        best = sorted(found, reverse=True)[:points]
        expected += sum(w * e for w, e in best) / sum(w for w, _ in best) / 2
    method, detector = Loss(Config(points=points), fake.pair()), fake.FakeDetector()
    told = Advice(detector, ask=lambda: its)
    assert method.losses(student, mine, teacher, batch, told)["feat"].item() == pytest.approx(expected, rel=1e-5)


def test_every_object_has_a_bump_and_it_is_highest_at_the_centre() -> None:
    batch, levels = labelled(), fake.taps(2, 1).pyramid
    for x, stride in zip(levels, fake.STRIDES, strict=True):
        found = object_bumps(batch, x, stride)
        assert 0 < found[1].amax() <= 1
        assert (found[1] > 0).sum() == 1, "a box smaller than a cell has the cell it lies in"
    fine = object_bumps(batch, levels[0], 8)[0]
    assert fine[5, 8] == fine[:, 7:11].amax(), "the second box's centre is (70, 45)"


def test_only_the_strongest_are_kept_and_they_sum_to_one() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(strongest(weights, 2), torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7], [0.0] * 4]))
    torch.testing.assert_close(strongest(weights, 9)[0], weights[0] / 0.8)


def test_scores_are_the_best_of_a_cells_answers() -> None:
    logits = outputs(1).class_logits
    for found, x in zip(best_scores(logits), logits, strict=True):
        torch.testing.assert_close(found, torch.stack([x[:, k].sigmoid() for k in range(6)]).amax(dim=0))


def test_no_gradient_reaches_the_scores() -> None:
    """Else the student could lower the loss by agreeing in score alone."""
    student, mine = fake.require_grad(fake.taps(2, 1)), outputs(3)
    logits = tuple(x.requires_grad_() for x in mine.class_logits)
    told = Advice(fake.FakeDetector(), ask=lambda: outputs(4))
    Loss(Config(), fake.pair()).losses(student, Outputs(logits, logits), fake.taps(2, 2), labelled(), told)[
        "feat"
    ].backward()
    assert all(x.grad is None for x in logits)
    assert all(x.grad is not None for x in student.pyramid)


@pytest.mark.parametrize("canvas", [(104, 136), (96, 136), (64, 96), (40, 200)])
def test_a_doubled_teachers_levels_stand_on_the_students_odd_grid(canvas: tuple[int, int]) -> None:
    doubled = fake.taps(1, 2, canvas=(2 * canvas[0], 2 * canvas[1]))
    shifted = level_shift(doubled.pyramid, fake.STRIDES, tuple(2 * s for s in fake.STRIDES))
    assert [x.shape for x in shifted] == [x.shape for x in fake.taps(1, 1, canvas=canvas).pyramid]
    assert align(doubled, fake.SHAPES, fake.SHAPES, 2).pyramid[0] is doubled.pyramid[1]


def test_other_heads_are_refused() -> None:
    other = replace(fake.SHAPES, places=("retinanet", "anchors"))
    with pytest.raises(ValueError, match="zoominnet compares"):
        Loss(Config(), fake.pair(teacher=other))
    with pytest.raises(ValueError, match="points"):
        Config(points=0)
