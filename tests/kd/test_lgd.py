"""LGD: what the assistant is told, what it makes of it, and the imitation; a run without a teacher."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Taps
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.blocks.box_cells import box_cells
from kd.blocks.foreground import all_boxes, cover
from kd.blocks.label_encoder import InstructiveLevels, LabelEncoder, described
from kd.distiller import Distiller, Lesson, Moment
from kd.methods.base import Advice, Pair
from kd.methods.lgd import Assistant, Config, Loss
from kd.step import global_totals
from tests.kd import fake, runs


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def uneven() -> Batch:
    """Two boxes, no box, one box."""
    made = fake.batch(3, 2)
    keep = (2, 0, 1)
    return replace(
        made,
        boxes=tuple(b[:n] for b, n in zip(made.boxes, keep, strict=True)),
        labels=tuple(torch.arange(n) for n in keep),
    )


def test_the_image_is_the_first_object_of_every_image() -> None:
    batch = uneven()
    told, boxes, there = described(batch, 3)
    assert there.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    height, width = fake.CANVAS
    assert boxes[:, 0].tolist() == [[0, 0, width, height]] * 3
    assert told[1, 0].tolist() == [-1, -1, 1, 1, -1, -1, -1], "of no class"
    x1, y1, x2, y2 = batch.boxes[0][1].tolist()
    expected = [2 * x1 / width - 1, 2 * y1 / height - 1, 2 * x2 / width - 1, 2 * y2 / height - 1, -1, 1, -1]
    assert told[0, 2].tolist() == pytest.approx(expected)


def test_boxes_have_the_cells_that_foreground_masks_give_them() -> None:
    """Also boxes smaller than a cell, on the border and beyond it."""
    boxes = torch.tensor([[3.0, 3, 4, 4], [0, 0, 136, 96], [130, 90, 136, 96], [16, 8, 32, 40], [135.5, 95.5, 136, 96]])
    batch = replace(fake.batch(1, 0), boxes=(boxes,))
    for stride, shape in ((8, (12, 17)), (32, (3, 5))):
        covered = cover(*all_boxes(batch), (1, *shape), stride)
        expected = torch.zeros(5, shape[0] * shape[1], dtype=torch.bool)
        expected[covered.box, covered.cell] = True
        assert torch.equal(box_cells(boxes[None], shape, stride)[0].flatten(1), expected)


def test_padding_changes_nothing() -> None:
    """An image's pyramid does not depend on how many objects its batch mates have."""
    assistant, batch, taps = Assistant(Config(), fake.pair()), uneven(), fake.taps(3, 1)
    whole = assistant.watch(fake.scene(taps, Taps(), batch))
    for row in range(3):
        alone = replace(
            batch,
            boxes=batch.boxes[row : row + 1],
            labels=batch.labels[row : row + 1],
            geometry=replace(batch.geometry, sizes=batch.geometry.sizes[row : row + 1]),
        )
        part = assistant.watch(fake.scene(fake.rows(taps, [row]), Taps(), alone))
        for mine, its in zip(part, whole, strict=True):
            torch.testing.assert_close(mine[0], its[row], rtol=1e-4, atol=1e-5)


def test_the_encoder_puts_each_label_beside_the_strongest_of_all() -> None:
    encoder = LabelEncoder(3, 8)
    told, there = torch.randn(1, 3, 7), torch.tensor([[True, True, False]])
    near = encoder.near(told)
    deep = encoder.deep(near)
    expected = encoder.join(torch.cat([near[0, 1], torch.maximum(deep[0, 0], deep[0, 1])]))
    torch.testing.assert_close(encoder(told, there)[0, 1], expected)


def test_a_level_is_painted_as_the_equation_says() -> None:
    """One object beside the context: gathered over its cells, asked about the labels, painted into its cells."""
    module = InstructiveLevels(4, 1).double()
    level, labels = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    inside = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    inside[0, 0], inside[0, 1, 0, :2] = True, True
    seen: list[Tensor] = []
    module.paint.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    found = module(level, labels, inside, torch.ones(1, 2, dtype=torch.bool))
    maps = module.appear(level)[0]
    gathered = [maps.flatten(1).mean(1), maps[:, 0, :2].mean(1)]
    query, key, value = module.attend.in_proj_weight.split(4)
    query_bias, key_bias, value_bias = module.attend.in_proj_bias.split(4)
    known = []
    for appearance in gathered:
        asks = query @ appearance + query_bias
        scores = [math.exp(((key @ x + key_bias) @ asks).item() / 2) for x in labels[0]]
        mixed = sum(s / sum(scores) * (value @ x + value_bias) for s, x in zip(scores, labels[0], strict=True))
        known.append(module.attend.out_proj(mixed))
    expected = torch.zeros(4, 3, 3, dtype=torch.float64)
    expected[:, 0, :2] = module.own(known[1])[:, None]
    torch.testing.assert_close(seen[0][0], expected)
    context = module.context(known[0])[:, None, None]
    torch.testing.assert_close(found, module.refine((module.paint(expected[None])[0] + context).relu()[None]))


def test_the_loss_is_the_mean_error_of_standardised_maps() -> None:
    method, student, made = Loss(Config(), fake.pair()), fake.taps(2, 1), fake.taps(2, 2).pyramid
    expected, numbers = 0.0, 0
    for level, target in zip(student.pyramid, made, strict=True):
        for s, t in zip(method.adapt(level).flatten(0, 1), target.flatten(0, 1), strict=True):
            mine, its = normal(s), normal(t)
            expected += sum((a - b) ** 2 for a, b in zip(mine, its, strict=True))
            numbers += len(mine)
    outputs = fake.FakeDetector().predict(student.pyramid, fake.batch(2).geometry)
    told = Advice(fake.FakeDetector(), pyramid=made)
    found = method.losses(student, outputs, Taps(), fake.batch(2), told)["feat"]
    assert found.item() == pytest.approx(expected / numbers, rel=1e-5)
    with pytest.raises(ValueError, match="needs its assistant's pyramid"):
        method.losses(student, outputs, Taps(), fake.batch(2), Advice(fake.FakeDetector()))


def normal(plane: Tensor) -> list[float]:
    values = plane.double().flatten().tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values) + 1e-5)
    return [(x - mean) / deviation for x in values]


def test_a_student_that_equals_the_instructive_pyramid_has_no_loss_and_one_cell_is_no_trouble() -> None:
    method, target = Loss(Config(), fake.pair()), torch.randn(1, 8, 4, 4)
    method.adapt = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    student = Taps(None, (target, torch.randn(1, 8, 1, 1)))
    outputs = fake.FakeDetector().predict(student.pyramid, fake.batch(1).geometry)
    told = Advice(fake.FakeDetector(), pyramid=(3 * target + 1, torch.randn(1, 8, 1, 1)))
    found = method.losses(student, outputs, Taps(), fake.batch(1), told)["feat"]
    assert found.item() == pytest.approx(0, abs=1e-5)


# ---- in a step


def prepared(**settings: Any) -> tuple[Distiller, dict[str, AssistantTrainer], Batch]:
    student, config = runs.detector(0), Config(start=0.0, freeze=0.0, **settings)
    pair = Pair(student=student.shapes, teacher=student.shapes)
    lesson = Lesson(name="lgd", teacher=None, config=config)
    distiller = Distiller(student, {"lgd": (lesson, Loss(config, pair))})
    batch = runs.images_of(0)
    batch = batch.with_totals(global_totals(distiller, [batch], World()))
    return distiller, {"lgd": AssistantTrainer(Assistant(config, pair), World())}, batch


def test_a_step_needs_no_teacher_and_labels_move_the_assistant() -> None:
    distiller, trainers, batch = prepared()
    before = runs.weights(trainers)
    losses = distiller(batch, {}, trainers, Moment(progress=0.0))
    assert losses.keys() >= {"task/cls", "kd/lgd/feat", "kd/lgd/head", "assistant/lgd"}
    assert not torch.equal(before, runs.weights(trainers))
    losses["kd/lgd/head"].backward(retain_graph=True)
    moved = {name.partition(".")[0] for name, p in distiller.student.named_parameters() if p.grad is not None}
    assert moved == {"head"}, "the pyramid is a constant"
    losses["kd/lgd/feat"].backward()
    moved = {name.partition(".")[0] for name, p in distiller.student.named_parameters() if p.grad is not None}
    assert moved == {"head", "fpn", "backbone"}
    assert "kd/lgd/head" not in distiller(batch, {}, prepared(moves_head=False)[1], Moment(progress=0.0))


def test_the_assistant_learns_what_the_labels_say() -> None:
    """Its detection loss falls on fixed maps; with other labels it makes another pyramid of them."""
    distiller, trainers, batch = prepared(learning_rate=1e-3)
    losses = [float(distiller(batch, {}, trainers, Moment(progress=0.0))["assistant/lgd"]) for _ in range(12)]
    assert losses[-1] < 0.97 * losses[0]
    taps = distiller.student.features(distiller.student.normalise(batch.images, batch.geometry))
    assistant = trainers["lgd"].assistant
    seen = fake.scene(taps, Taps(), batch, distiller.student)
    other = replace(seen, batch=replace(batch, labels=tuple((x + 1) % runs.CLASSES for x in batch.labels)))
    mine, its = assistant.watch(seen)[0], assistant.watch(other)[0]
    assert torch.equal(mine[1], its[1]), "this image has no object"
    assert not torch.allclose(mine[0], its[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "make", [lambda: Config(heads=0), lambda: Assistant(Config(heads=3), fake.pair()), lambda: Config(learning_rate=0)]
)
def test_settings_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        make()
