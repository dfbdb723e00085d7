"""TinyKD: its weights and its patches against loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kd.blocks.foreground import all_boxes, cover_objects
from kd.blocks.patch_attention import PatchAttention
from kd.methods.tinykd import Config, Loss
from tests.kd import fake

BOXES = (torch.tensor([[4.0, 4.0, 20.0, 30.0], [10.0, 8.0, 14.0, 13.0], [50.0, 10.0, 90.5, 80.0]]), torch.zeros(0, 4))


def weights_in_loops(shape: tuple[int, int], stride: int) -> list[list[list[float]]]:
    """Per image (H, W), from masks over pixels and a max-pooling of stride x stride."""
    found = []
    for boxes in BOXES:
        pixels = [[0.0] * (shape[1] * stride) for _ in range(shape[0] * stride)]
        for x1, y1, x2, y2 in boxes.tolist():
            rows, columns = range(math.floor(y1), math.ceil(y2)), range(math.floor(x1), math.ceil(x2))
            for y in rows:
                for x in columns:
                    pixels[y][x] = max(pixels[y][x], 1 / (len(rows) * len(columns)))
        cells = [
            [
                max(pixels[row * stride + y][column * stride + x] for y in range(stride) for x in range(stride))
                for column in range(shape[1])
            ]
            for row in range(shape[0])
        ]
        total, empty = sum(map(sum, cells)), sum(cell == 0 for row in cells for cell in row)
        found.append([[cell / total if cell else 0.5 / empty for cell in row] for row in cells])
    return found


def test_features_are_imitated_by_weights_made_at_the_resolution_of_the_image() -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), replace(fake.batch(2), boxes=BOXES)
    expected = 0.0
    for s, t, stride in zip(student.pyramid, teacher.pyramid, fake.STRIDES, strict=True):
        error = (s.double() - t.double()).square().mean(dim=1)
        expected += (error * torch.tensor(weights_in_loops(s.shape[2:], stride)).double()).sum().item() / 2  # pyright: ignore
    assert fake.run(Loss(Config(), fake.pair()), student, teacher, batch)["feat"].item() == pytest.approx(expected)


def test_objects_weigh_one_in_each_image_and_the_smallest_wins() -> None:
    method, batch = Loss(Config(background=0.0), fake.pair()), replace(fake.batch(2), boxes=BOXES)
    like = fake.taps(2, 1).pyramid[0]
    weights = method._weights(batch, like, 8)
    assert weights.sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 0.0])
    # The cell with the tiny box (4 x 5 pixels inside 16 x 26) weighs as 1 / 20, its neighbour below as 1 / 416.
    assert (weights[0, 1, 1] / weights[0, 2, 1]).item() == pytest.approx(416 / 20)
    background = Loss(Config(foreground=0.0), fake.pair())._weights(batch, like, 8)
    assert background.sum(dim=(1, 2)).tolist() == pytest.approx([0.5, 0.5])
    assert background[1].unique().tolist() == pytest.approx([0.5 / like[0, 0].numel()])


def test_background_is_every_cell_that_meets_no_box() -> None:
    level = cover_objects(replace(fake.batch(2), boxes=BOXES), fake.taps(2, 1).pyramid[0], 8)
    assert torch.equal(level.background() > 0, ~level.any())
    assert level.background().sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0])
    assert len(all_boxes(replace(fake.batch(2), boxes=BOXES))[0]) == 3


def attended(x: Tensor, block: PatchAttention) -> Tensor:
    """One (C, H, W) map, patch by patch and cell by cell."""
    q, k, v = (
        torch.einsum("oc,chw->ohw", part.weight.double()[..., 0, 0], x) + part.bias.double()[:, None, None]  # pyright: ignore
        for part in (block.query, block.key, block.value)
    )
    mixed = torch.zeros_like(x)
    height, width = x.shape[1:]
    for row in range(height):
        for column in range(width):
            top, left = row - row % block.size, column - column % block.size
            rows, columns = range(top, min(top + block.size, height)), range(left, min(left + block.size, width))
            cells = [(r, c) for r in rows for c in columns]
            scores = torch.stack([(q[:, row, column] @ k[:, r, c]) / block.temperature for r, c in cells]).softmax(0)
            mixed[:, row, column] = sum(s * v[:, r, c] for s, (r, c) in zip(scores, cells, strict=True))
    return (
        x
        + torch.einsum("oc,chw->ohw", block.out.weight.double()[..., 0, 0], mixed)
        + block.out.bias.double()[:, None, None]
    )  # pyright: ignore


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (2, 3)])
def test_patches_attend_to_their_own_real_cells(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block, x = PatchAttention(6, size=4, temperature=0.05), torch.randn(2, 6, *shape)
    assert torch.equal(block(x), x), "the identity at first"
    for part in (block.query, block.key, block.value, block.out):
        nn.init.normal_(part.weight, std=0.2)
        nn.init.normal_(part.bias, std=0.2)  # pyright: ignore
    expected = torch.stack([attended(image.double(), block) for image in x])
    torch.testing.assert_close(block(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_relation_term_compares_what_has_been_related() -> None:
    torch.manual_seed(0)
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), fake.batch(2)
    method = Loss(Config(), fake.pair())
    terms = fake.run(method, student, teacher, batch)
    torch.testing.assert_close(terms["relation"], terms["feat"], msg="both start as the identity")
    for block in (*method.student_relation, *method.teacher_relation):
        nn.init.normal_(block.out.weight, std=1.0)  # pyright: ignore
    related = fake.run(method, student, teacher, batch)
    assert related["feat"] == terms["feat"]
    s, t = (
        replace(taps, pyramid=tuple(block(x) for block, x in zip(blocks, taps.pyramid, strict=True)))
        for taps, blocks in ((student, method.student_relation), (teacher, method.teacher_relation))
    )
    torch.testing.assert_close(related["relation"], fake.run(method, s, t, batch)["feat"])


def test_terms_are_weighted_and_left_out() -> None:
    taps, batch = (fake.taps(2, 1), fake.taps(2, 2)), fake.batch(2)
    whole = fake.run(Loss(Config(), fake.pair()), *taps, batch)
    half = fake.run(Loss(Config(feature=0.5, relation=0.0), fake.pair()), *taps, batch)
    assert half == {"feat": whole["feat"] / 2}


@pytest.mark.parametrize("settings", [{"feature": -1.0}, {"background": -1.0}, {"patch": 0}, {"temperature": 0.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)  # pyright: ignore[reportArgumentType]
