"""HMKD: which levels speak to which, which small objects are asked about, and each of its losses in float64 loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Taps
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.blocks.gcblock import ContextError
from kd.blocks.inquiry_head import InquiryConfig, SmallObjects, small_objects
from kd.blocks.instance_values import own_share
from kd.methods.hmkd import Assistant, Config, Loss, Small
from tests.kd import fake

DECODER, HEAD = fake.DECODER, fake.INQUIRY
P2_TO_P5 = (4, 8, 16, 32)


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def config(**changes: Any) -> Config:
    return Config(**{"decoder": DECODER, "inquiry": HEAD} | changes)


def scene_of(*boxes: list[list[float]], **changes: Any) -> Batch:
    """Images with these boxes each, x1 y1 x2 y2."""
    made = fake.batch(len(boxes), 0)
    found = tuple(torch.tensor(b).reshape(-1, 4) for b in boxes)
    labels = tuple(torch.zeros(len(b), dtype=torch.int64) for b in found)
    return replace(made, boxes=found, labels=labels, **changes)


SMALL_AND_LARGE = [[8.0, 8.0, 24.0, 20.0], [40.0, 16.0, 104.0, 90.0]]


def run(settings: Config, student: Taps, teacher: Taps, batch: Batch) -> dict[str, float]:
    torch.manual_seed(3)
    method, assistant = Loss(settings, fake.pair()), Assistant(settings, fake.pair())
    return {name: x.item() for name, x in fake.run(method, student, teacher, batch, assistant=assistant).items()}


# ---- levels


@pytest.mark.parametrize(
    ("settings", "strides", "expected"),
    [
        ({}, P2_TO_P5, [(1, 0)]),  # P3 inquires, P2 answers
        ({}, (8, 16, 32), [(1, 0)]),  # no P2: P4 and P3
        ({"start_layer": 2}, P2_TO_P5, [(0, 0)]),
        ({"start_layer": 4}, P2_TO_P5, [(2, 1)]),
        ({"start_layer": 3, "start_is": "key"}, P2_TO_P5, [(2, 1)]),
        ({"pairs": ((3, 2), (4, 3))}, P2_TO_P5, [(1, 0), (2, 1)]),
    ],
)
def test_the_start_layer_inquires_and_the_next_finer_level_answers(
    settings: dict[str, Any], strides: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    assert Config(**settings).levels(strides) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_layer": 2}, "hmkd.start_layer asks for P2, which the student lacks: its pyramid has P3, P4, P5"),
        ({"start_layer": 5, "start_is": "key"}, "asks for P6"),
        ({"pairs": ((3, 2), (4, 3))}, "hmkd.pairs asks for P2"),
    ],
)
def test_a_level_that_the_student_lacks_is_refused(settings: dict[str, Any], message: str) -> None:
    for maker in (Loss, Assistant):
        with pytest.raises(ValueError, match=message):
            maker(Config(**settings), fake.pair())


def test_a_level_outside_the_pairs_is_not_read_by_the_small_term() -> None:
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), scene_of(SMALL_AND_LARGE)
    other = Taps(None, (*student.pyramid[:2], student.pyramid[2] + 1))
    assert run(config(), student, teacher, batch)["small"] == run(config(), other, teacher, batch)["small"]
    two = config(pairs=((4, 3), (5, 4)))
    assert run(two, student, teacher, batch)["small"] != run(config(), student, teacher, batch)["small"]


# ---- small objects


def test_small_is_measured_in_the_annotations_pixels_or_the_canvass() -> None:
    """A box of 24 x 24 canvas pixels, of an image that was halved: 48 x 48 in the annotation."""
    box = [[0.0, 0.0, 24.0, 24.0]]
    halved = scene_of(box, box, scales=torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    assert small_objects(halved, 32, True, 1.0).small.tolist() == [[False], [True]]
    assert small_objects(halved, 32, False, 1.0).small.tolist() == [[True], [True]]
    assert small_objects(scene_of(box), 32, True, 1.0).small.tolist() == [[True]]


def test_an_object_of_exactly_32_by_32_is_not_small() -> None:
    found = small_objects(scene_of([[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 32.0, 31.9]]), 32, True, 1.0)
    assert found.small.tolist() == [[False, True]]


def test_wanted_cells_are_near_a_small_objects_centre() -> None:
    boxes = [*SMALL_AND_LARGE, [90.0, 90.0, 91.0, 91.0], [130.0, 90.0, 136.0, 96.0]]
    objects = small_objects(scene_of(boxes), 32, True, 1.0)
    found = objects.near((12, 17), 8)[0].tolist()
    for box, small, cells in zip(boxes, (True, False, True, True), found, strict=True):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        reach = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        for i in range(12):
            for j in range(17):
                close = math.hypot(8 * j + 4 - x, 8 * i + 4 - y) < reach
                assert cells[i][j] == (small and (close or (i, j) == (y // 8, x // 8)))
    assert sum(map(sum, found[2])) == 1, "an object of one pixel has the cell that holds it"


def test_the_heads_loss_is_the_focal_loss_without_padding_and_ignored_regions() -> None:
    batch = scene_of(SMALL_AND_LARGE, ignore=(torch.tensor([[0.0, 0.0, 32.0, 32.0]]),))
    batch = replace(batch, geometry=replace(batch.geometry, sizes=torch.tensor([[96, 60]])))
    objects, logits = small_objects(batch, 32, True, 1.0), torch.randn(1, 6, 9)
    settings, expected = InquiryConfig(), 0.0
    for i in range(6):
        for j in range(9):
            wanted = bool(objects.near((6, 9), 16)[0, :, i, j].any())
            x, y, z = 16 * j + 8, 16 * i + 8, logits[0, i, j].item()
            if not wanted and (x >= 60 or (x < 32 and y < 32)):
                continue
            p = 1 / (1 + math.exp(-z)) if wanted else 1 - 1 / (1 + math.exp(-z))
            alpha = settings.alpha if wanted else 1 - settings.alpha
            expected += -alpha * (1 - p) ** settings.gamma * math.log(p) / 54
    assert objects.focal(logits, 16, settings).item() == pytest.approx(expected, rel=1e-5)


def hot(*cells: tuple[int, int]) -> Tensor:
    logits = torch.full((1, 12, 17), -9.0)
    for rank, (i, j) in enumerate(cells):
        logits[0, i, j] = 5.0 - rank
    return logits


def candidates(objects: SmallObjects, logits: Tensor, **changes: Any) -> tuple[list[bool], list[list[float]]]:
    found, (places, valid) = objects.candidates(logits, 8, InquiryConfig(**changes), 4)
    return found[0].tolist(), places[0][valid[0]].tolist()


def test_candidates_choose_the_small_objects_and_lonely_ones_become_inventions() -> None:
    boxes = [*SMALL_AND_LARGE, [100.0, 60.0, 110.0, 70.0]]
    objects = small_objects(scene_of(boxes), 32, True, 1.0)
    # The first object's centre is in cell (1, 2); cell (5, 9) is on the large one alone.
    assert candidates(objects, hot((1, 2), (5, 9))) == ([True, False, False], [[76.0, 44.0]])
    assert candidates(objects, hot()) == ([True, False, True], []), "nobody is found: all small ones are asked about"
    assert candidates(objects, hot(), fallback=False) == ([False, False, False], [])
    assert candidates(objects, hot((1, 2)), threshold=0.999) == ([True, False, True], [])


# ---- the losses


def test_the_small_loss_is_its_equation() -> None:
    """By hand from what the assistant says; sums over heads, small objects and cells, the mean over images."""
    settings, batch = config(), scene_of(SMALL_AND_LARGE, [])
    method, assistant = Loss(settings, fake.pair()), Assistant(settings, fake.pair())
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    notes = fake.advised(assistant, student, teacher, batch).notes
    attention, its = notes["attention0"], notes["values0"]
    assert attention.shape == (2, 2, 12 * 17)
    torch.testing.assert_close(attention.sum(2), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    project = method.get_submodule("project.0.project")
    mine = project(student.pyramid[0].flatten(2).transpose(1, 2))
    expected = 0.0
    for head in range(2):
        for u in range(attention.shape[2]):
            a, t = (normal(x[0, u, 4 * head : 4 * head + 4]) for x in (mine, its))
            expected += attention[0, head, u].item() * sum((x - y) ** 2 for x, y in zip(a, t, strict=True)) / 4
    found = fake.run(method, student, teacher, batch, assistant=assistant)["small"]
    assert found.item() == pytest.approx(1e-3 * expected / 2, rel=1e-5)


def normal(values: Tensor) -> list[float]:
    found = values.double().tolist()
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in found) / len(found) + 1e-5)
    return [(x - mean) / deviation for x in found]


def test_the_mean_divides_by_heads_and_objects() -> None:
    boxes = [*SMALL_AND_LARGE, [100.0, 60.0, 110.0, 70.0]]
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), scene_of(boxes)
    whole, mean = (run(config(small=Small(reduce=how)), student, teacher, batch) for how in ("sum", "mean"))  # pyright: ignore
    assert mean["small"] == pytest.approx(whole["small"] / (2 * 2), rel=1e-5)


def test_mk_is_one_inside_the_box_and_more_under_a_smaller_one() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 32.0, 32.0], [16.0, 16.0, 32.0, 32.0]]])
    share = own_share(boxes, scene_of(boxes[0].tolist()), torch.zeros(1, 1, 12, 17), 8).view(1, 2, 12, 17)[0]
    expected = torch.zeros(2, 12, 17)
    expected[0, :4, :4] = 1
    expected[0, 2:4, 2:4] = 4  # 16 cells of the large box for 4 of the small one
    expected[1, 2:4, 2:4] = 1
    torch.testing.assert_close(share, expected)
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), scene_of(SMALL_AND_LARGE)
    plain, inside = (run(config(small=Small(use_mk=on)), student, teacher, batch)["small"] for on in (False, True))
    assert 0 < inside < plain


def test_others_are_larger_objects_and_levels_that_nobody_is_asked_on() -> None:
    """Cell by cell: 1 / (H W) of the smallest box over the cell, small objects not on the answering level."""
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), scene_of([*SMALL_AND_LARGE, [40.0, 20.0, 90.0, 60.0]])
    expected = 0.0
    for level, stride in enumerate(fake.STRIDES):
        s, t = student.pyramid[level][0].double(), teacher.pyramid[level][0].double()
        _, rows, columns = s.shape
        covered: dict[tuple[int, int], float] = {}
        for x1, y1, x2, y2 in batch.boxes[0].tolist():
            if level == 0 and (x2 - x1) * (y2 - y1) < 32**2:
                continue
            cells = [
                (i, j)
                for i in range(rows)
                for j in range(columns)
                if i * stride < y2 and (i + 1) * stride > y1 and j * stride < x2 and (j + 1) * stride > x1
            ]
            for cell in cells:
                covered[cell] = max(covered.get(cell, 0.0), 1 / len(cells))
        for (i, j), weight in covered.items():
            expected += weight * (s[:, i, j] - t[:, i, j]).square().sum().item()
    assert run(config(), student, teacher, batch)["others"] == pytest.approx(1e-3 * expected, rel=1e-5)


@pytest.mark.parametrize("absdiff", [False, True])
def test_a_new_background_loss_is_plain_l2(absdiff: bool) -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        expected += sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)) / 8
    found = run(config(absdiff=absdiff), student, teacher, scene_of([], []))
    assert found["background"] == pytest.approx(1e-3 * expected / 2, rel=1e-5)


def test_background_is_the_difference_of_two_contexts_or_the_context_of_the_difference() -> None:
    student, teacher = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    for absdiff in (False, True):
        error = ContextError(4, 1, absdiff)
        for block in (*error.student, *error.teacher):
            torch.nn.init.normal_(block.get_parameter("expand.weight"))
        mine = error.student[0]
        apart = mine((teacher - student).abs()) if absdiff else error.teacher[0](teacher) - mine(student)
        torch.testing.assert_close(error((student,), (teacher,)), apart.square().mean(1).sum())


def test_weights_leave_terms_out_and_advice_is_asked_for_by_name() -> None:
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), scene_of(SMALL_AND_LARGE)
    assert list(run(config(), student, teacher, batch)) == ["small", "others", "background"]
    assert list(run(config(alpha=0.0), student, teacher, batch)) == ["small", "others"]
    assert list(run(config(beta=0.0), student, teacher, batch)) == ["background"]
    assert not Config(beta=0.0).assisted
    student_too = config(alpha=0.0, beta=0.0, inquiry=replace(HEAD, student=2.0))
    assert list(run(student_too, student, teacher, batch)) == ["inquiry"]
    with pytest.raises(ValueError, match="needs its assistant's attention"):
        fake.run(Loss(config(), fake.pair()), student, teacher, batch)


@pytest.mark.parametrize("boxes", [[SMALL_AND_LARGE, []], [[], []]])
def test_the_assistant_learns_from_its_own_loss(boxes: list[list[list[float]]]) -> None:
    settings = config(decoder=replace(DECODER, learning_rate=1e-2, clip=None))
    assistant = Assistant(settings, fake.pair())
    trainer, batch = AssistantTrainer(assistant, World()), scene_of(*boxes)
    seen = fake.scene(fake.taps(2, 1), fake.taps(2, 2), batch)
    losses = []
    for _ in range(10):
        loss = assistant.loss(assistant.advise(assistant.watch(seen), seen), seen)
        losses.append(loss.item())
        trainer.learn(loss)
        trainer.step()
    assert losses[-1] < 0.8 * losses[0]
    loss = assistant.loss(assistant.advise(assistant.watch(seen), seen), seen)
    gradients = torch.autograd.grad(loss, list(assistant.parameters()))
    idle = {n for (n, _), g in zip(assistant.named_parameters(), gradients, strict=True) if not g.any()}
    # Without an object nobody is asked for sides.
    assert idle == (set() if boxes[0] else {"decoders.0.sides.weight", "decoders.0.sides.bias"})


def test_the_papers_values() -> None:
    made = Config()
    assert (made.alpha, made.beta, made.decoder.heads, made.decoder.width) == (1e-3, 1e-3, 8, 256)
    assert (made.inquiry.gamma, made.inquiry.threshold, made.inquiry.weight) == (1.2, 0.12, 10.0)
    assert isinstance(Assistant(config(), fake.pair()).optimizer(), torch.optim.AdamW)


@pytest.mark.parametrize(
    "make", [lambda: Small(side=0), lambda: InquiryConfig(threshold=1.0), lambda: Config(alpha=-1)]
)
def test_settings_that_cannot_work_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()
