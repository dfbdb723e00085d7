"""FGD: its terms against loops, its masks, and what it becomes without them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Taps
from kd.blocks.foreground import cover_objects
from kd.methods.fgd import DEFAULTS, Config, Loss
from tests.kd import fake

BOXES = (torch.tensor([[4.0, 4.0, 20.0, 30.0], [0.0, 0.0, 90.0, 80.0]]), torch.tensor([[101.0, 33.0, 106.0, 38.0]]))
"""The first box lies in the second."""


def labelled() -> Batch:
    return replace(fake.batch(2), boxes=BOXES)


def masks(boxes: Tensor, shape: tuple[int, int], stride: int) -> tuple[list[float], list[float]]:
    """(H * W) of objects and of background, cell by cell: 1 / the cells of the smallest box, 1 / empty cells."""
    cells = [(row, column) for row in range(shape[0]) for column in range(shape[1])]

    def met(box: list[float]) -> list[bool]:
        across = [box[0] < (c + 1) * stride and box[2] > c * stride for _, c in cells]
        return [
            a and box[1] < (r + 1) * stride and box[3] > r * stride for a, (r, _) in zip(across, cells, strict=True)
        ]

    inside = [met(box) for box in boxes.tolist()]
    objects = [max((1 / sum(m) for m in inside if m[i]), default=0.0) for i in range(len(cells))]
    empty = sum(o == 0 for o in objects)
    return objects, [0.0 if o else 1 / empty for o in objects]


def attended(x: Tensor, temperature: float) -> tuple[list[float], list[float]]:
    """One (C, H, W) map -> its spatial (H * W) and channel (C) attention."""
    found = []
    for rows in (x.double().flatten(1).T.tolist(), x.double().flatten(1).tolist()):
        parts = [math.exp(sum(abs(v) for v in row) / len(row) / temperature) for row in rows]
        found.append([len(parts) * p / sum(parts) for p in parts])
    return found[0], found[1]


def test_the_focal_term_weighs_objects_background_and_attention() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    method = Loss(Config(temperature=0.7, foreground=0.3, background=0.2), fake.pair())
    expected = 0.0
    for s, t, stride in zip(student.pyramid, teacher.pyramid, fake.STRIDES, strict=True):
        for i in range(2):
            objects, background = masks(BOXES[i], (s.shape[2], s.shape[3]), stride)
            where, which = attended(t[i], 0.7)
            squares = (s[i].double() - t[i].double()).square().flatten(1).tolist()
            for c, row in enumerate(squares):
                for p, square in enumerate(row):
                    expected += (0.3 * objects[p] + 0.2 * background[p]) * where[p] * which[c] * square / 2
    assert fake.run(method, student, teacher, labelled())["feat"].item() == pytest.approx(expected, rel=1e-5)


def test_the_attention_term_is_the_distance_of_both_maps() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        for i in range(2):
            pairs = zip(attended(s[i], 0.5), attended(t[i], 0.5), strict=True)
            expected += 5e-4 * sum(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)) / 2
    found = fake.run(Loss(Config(), fake.pair()), student, teacher, labelled())["attention"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_global_term_starts_as_plain_squares_and_then_compares_what_the_blocks_see() -> None:
    torch.manual_seed(0)
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), labelled()
    method = Loss(Config(), fake.pair())

    def plain(s: list[Tensor], t: list[Tensor]) -> float:
        return 5e-6 * sum((a.double() - b.double()).square().sum().item() for a, b in zip(s, t, strict=True)) / 2

    found = fake.run(method, student, teacher, batch)["relation"].item()
    assert found == pytest.approx(plain(list(student.pyramid), list(teacher.pyramid)), rel=1e-5)
    for block in (*method.student_relation, *method.teacher_relation):
        nn.init.normal_(block.expand.weight)  # pyright: ignore
    s = [block(x) for block, x in zip(method.student_relation, student.pyramid, strict=True)]
    t = [block(x) for block, x in zip(method.teacher_relation, teacher.pyramid, strict=True)]
    assert fake.run(method, student, teacher, batch)["relation"].item() == pytest.approx(plain(s, t), rel=1e-5)
    assert plain(s, t) != pytest.approx(found, rel=1e-2)


def test_masks_sum_to_the_boxes_and_to_one() -> None:
    """Objects: one per box, and less where boxes overlap, since the smallest takes a cell."""
    apart = replace(fake.batch(2), boxes=(torch.tensor([[4.0, 4.0, 20.0, 30.0], [100.0, 64.0, 130.0, 90.0]]), BOXES[1]))
    for batch, objects in ((apart, [2.0, 1.0]), (labelled(), [None, 1.0])):
        for x, stride in zip(fake.taps(2, 1).pyramid, fake.STRIDES, strict=True):
            level = cover_objects(batch, x, stride)
            found = level.greatest(1 / level.cells).sum(dim=(1, 2)).tolist()
            assert found[1] == pytest.approx(1.0)
            assert found[0] == pytest.approx(objects[0]) if objects[0] else 1 < found[0] < 2
            assert level.background().sum(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0])


def test_a_tiny_object_pulls_as_hard_as_a_large_one() -> None:
    """A student that errs by one everywhere: each box's share of the loss is the same."""
    teacher = fake.taps(1, 2)
    flat = Taps(teacher.c5, tuple(torch.ones_like(x) for x in teacher.pyramid))
    student = Taps(teacher.c5, tuple(x + 1 for x in flat.pyramid))
    sizes = []
    for box in ([40.0, 40.0, 44.0, 44.0], [10.0, 10.0, 90.0, 90.0]):
        batch = replace(fake.batch(1), boxes=(torch.tensor([box]),))
        method = Loss(Config(background=0.0), fake.pair())
        sizes.append(fake.run(method, student, flat, batch)["feat"].item())
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5) == pytest.approx(3 * 8 * 1e-3, rel=1e-5)


@pytest.mark.parametrize("name", ["fcos", "one_stage", "two_stage"])
def test_weights_are_the_authors_by_detector_or_family(name: str) -> None:
    shapes = replace(fake.SHAPES, family="two_stage" if name == "two_stage" else "one_stage")
    shapes = replace(shapes, places=("fcos", 0.0) if name == "fcos" else ("retinanet",))
    loss = Loss(Config(attention=7.0), fake.pair(student=shapes))
    assert (loss.temperature, loss.foreground, loss.background, 7.0, loss.relation) == (
        *DEFAULTS[name][:3],
        loss.attention,
        DEFAULTS[name][4],
    )


def test_terms_of_weight_zero_are_left_out() -> None:
    def terms(**weights: float) -> set[str]:
        method = Loss(Config(**weights), fake.pair())
        return set(fake.run(method, fake.taps(1, 1), fake.taps(1, 2), fake.batch(1)))

    assert terms() == {"feat", "attention", "relation"}
    assert terms(relation=0.0) == {"feat", "attention"}
    assert terms(background=0.0, attention=0.0) == {"feat", "relation"}
    assert terms(background=0.0, foreground=0.0) == {"attention", "relation"}


@pytest.mark.parametrize("settings", [{"foreground": -1.0}, {"relation": -1.0}, {"temperature": 0.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)
