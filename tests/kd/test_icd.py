"""ICD: what the decoder is asked, its attention and its own loss in float64 loops, and the imitation under it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Geometry, Taps
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.blocks.decoder import DecoderConfig, InstanceDecoder
from kd.blocks.inquiry import Asking, Inquiries, ask
from kd.blocks.position import place_code, sine_code
from kd.methods.icd import Assistant, Config, Loss
from tests.kd import fake

SMALL = fake.DECODER
ASKING = Asking(classes=3, fakes=5, most=300, jitter=0.3, purpose="test")


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def some_boxes(*counts: int) -> Batch:
    """Images with so many boxes each, of different classes and sizes."""
    made = fake.batch(len(counts), 0)
    boxes = tuple(torch.cat([c := torch.rand(n, 2) * 50, c + 1 + torch.rand(n, 2) * 40], dim=1) for n in counts)
    return replace(
        made,
        boxes=boxes,
        labels=tuple(torch.arange(n) % 3 for n in counts),
        totals={**made.totals, "boxes": torch.tensor(float(sum(counts)))},
    )


def pair_of(config: Config, teacher: fake.Shapes = fake.SHAPES) -> tuple[Loss, Assistant]:
    return Loss(config, fake.pair(teacher=teacher)), Assistant(config, fake.pair(teacher=teacher))


# ---- what is asked


def test_every_object_is_asked_about_and_five_times_as_many_that_are_not_there() -> None:
    batch = some_boxes(3, 0, 1)
    asked = ask(batch, ASKING)
    assert asked.real.sum(1).tolist() == [3, 0, 1]
    assert (asked.present & ~asked.real).sum(1).tolist() == [15, 1, 5], "at least one, or nobody would learn"
    found = {tuple(box) for box in asked.boxes[0][asked.real[0]].tolist()}
    assert found == {tuple(box) for box in batch.boxes[0].tolist()}
    height, width = fake.CANVAS
    invented = asked.centres[asked.present & ~asked.real]
    assert ((invented >= 0) & (invented <= torch.tensor([width, height]))).all()


def test_centres_are_off_by_at_most_the_jitter() -> None:
    batch = some_boxes(200)
    asked = ask(batch, replace(ASKING, most=2000))
    sizes = asked.boxes[..., 2:] - asked.boxes[..., :2]
    off = (asked.centres - (asked.boxes[..., :2] + asked.boxes[..., 2:]) / 2)[asked.real] / sizes[asked.real]
    assert off.abs().max() <= 0.3 + 1e-4
    assert off.min() < -0.2
    assert off.max() > 0.2


def test_there_are_never_more_inquiries_than_allowed() -> None:
    asked = ask(some_boxes(9, 2), replace(ASKING, most=7))
    assert asked.real.sum(1).tolist() == [7, 2]
    assert asked.present.sum(1).tolist() == [8, 7]


def test_an_images_inquiries_do_not_depend_on_its_batch_mates() -> None:
    """But on seed, epoch and image."""
    batch = replace(some_boxes(2, 6), key=(0, 1))
    alone = replace(batch, boxes=batch.boxes[:1], labels=batch.labels[:1], image_ids=(0,), geometry=one(batch.geometry))
    whole, part = ask(batch, ASKING), ask(alone, ASKING)

    def of_first(asked: Inquiries) -> list[list[float]]:
        mask = asked.present[0]
        found = torch.cat([asked.boxes[0], asked.centres[0], asked.labels[0][:, None], asked.real[0][:, None]], dim=1)
        return found[mask].tolist()

    assert of_first(whole) == of_first(part)
    for other in (replace(alone, key=(0, 2)), replace(alone, image_ids=(5,))):
        assert of_first(ask(other, ASKING)) != of_first(part)


def one(geometry: Geometry) -> Geometry:
    return Geometry(geometry.canvas, geometry.sizes[:1])


def test_a_description_names_class_place_and_size() -> None:
    asked = Inquiries(
        boxes=torch.tensor([[[0.0, 0, 8, 70], [0, 0, 1, 1000]]]),
        centres=torch.tensor([[[12.0, 4.0], [0.0, 0.0]]]),
        labels=torch.tensor([[2, 0]]),
        real=torch.ones(1, 2, dtype=torch.bool),
        present=torch.ones(1, 2, dtype=torch.bool),
    )
    described = asked.describe(3, 8)
    assert described.shape == (1, 2, 3 + 256 + 10)
    assert described[0, 0, :3].tolist() == [0, 0, 1]
    # 12 and 4 pixels are the centre of the second cell of the first row.
    torch.testing.assert_close(described[0, 0, 3:259], sine_code(1, 2, 256, 1, described.device)[0, :, 0, 1])
    assert described[0, 0, 259:].reshape(2, 5).argmax(1).tolist() == [0, 3]
    assert described[0, 1, 259:].reshape(2, 5).argmax(1).tolist() == [0, 4]
    assert torch.equal(place_code(torch.zeros(1, 2), 8), torch.tensor([[0.0, 0, 1, 1, 0, 0, 1, 1]]))


# ---- the decoder


def test_attention_is_its_equation_and_leaves_the_padding_out() -> None:
    decoder = InstanceDecoder(6, 3, SMALL).double()
    inside = torch.tensor([[True, True, False, True, True]])
    described, cells, places = (torch.randn(n, dtype=torch.float64) for n in ((1, 2, 269), (1, 5, 6), (5, 256)))
    attention, values, _, _ = decoder(described, cells, places, inside)
    asks = decoder.query(decoder.encode(described))[0]
    for query in range(2):
        for head in range(2):
            channels = slice(4 * head, 4 * head + 4)
            scores = []
            for u in range(5):
                content = cells[0, u] + decoder.place(places[u])
                key = decoder.key.weight[channels] @ content
                scores.append(math.exp((key @ asks[query, channels]).item() / 2) if inside[0, u] else 0.0)
            expected = torch.tensor([s / sum(scores) for s in scores])
            torch.testing.assert_close(attention[0, head, query].float(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(values[0], cells[0] @ decoder.value.weight.T + decoder.value.bias)


def test_the_decoders_loss_is_its_formula() -> None:
    """Cross-entropy over what is asked, and the sides' errors as shares of the box over what is there."""
    batch = some_boxes(2, 0)
    decoder, taps = InstanceDecoder(8, 3, SMALL), fake.taps(2, 1)
    asked = ask(batch, ASKING)
    told: list[Tensor] = []
    decoder.register_forward_hook(lambda module, inputs, outputs: told.extend(outputs[2:]))
    _, _, erred = decoder.look(asked, taps.pyramid, fake.STRIDES, batch.geometry)
    exists, sides = (x.detach().double() for x in told)
    for image in range(2):
        entropy, off = [], []
        for q in range(asked.present.shape[1]):
            if not asked.present[image, q]:
                continue
            p, real = 1 / (1 + math.exp(-exists[image, q])), bool(asked.real[image, q])
            entropy.append(-math.log(p if real else 1 - p))
            if real:
                x1, y1, x2, y2 = asked.boxes[image, q].double().tolist()
                x, y = asked.centres[image, q].double().tolist()
                for i, truth in enumerate((x - x1, y - y1, x2 - x, y2 - y)):
                    size = (x2 - x1, y2 - y1)[i % 2]
                    unit = 8 * 2 ** min(4, max(0, math.floor(math.log2(size / 8))))
                    off.append(abs(math.log1p(math.exp(sides[image, q, i])) * unit - truth) / size)
        expected = sum(entropy) / len(entropy) + (sum(off) / len(off) if off else 0)
        assert erred[image].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_the_assistant_learns_from_its_own_loss(counts: tuple[int, int]) -> None:
    """Also where there is no object: the invented ones are then all it learns from. Adam's first steps say which
    parameters have a gradient."""
    assistant = Assistant(Config(decoder=replace(SMALL, learning_rate=1e-3)), fake.pair())
    trainer, batch, taps = AssistantTrainer(assistant, World()), some_boxes(*counts), fake.taps(2, 1)
    seen = fake.scene(taps, fake.taps(2, 2), batch)
    losses = []
    for _ in range(30):
        loss = assistant.loss(assistant.advise(assistant.watch(seen), seen), seen)
        losses.append(loss.item())
        trainer.learn(loss)
        trainer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_papers_optimizer() -> None:
    assistant = Assistant(Config(), fake.pair())
    optimizer = assistant.optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], assistant.clip) == (1e-4, 1e-4, 0.01)
    assert [assistant.rate(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert assistant.decoder.heads == 8
    assert round(Config().start * 90_000) == 1_000


# ---- the imitation


@pytest.mark.parametrize("values", ["own", "shared"])
def test_the_loss_is_its_equation(values: Any) -> None:
    """By hand from the decoder's attention and values: heads, objects and cells one by one."""
    config = Config(values=values, decoder=SMALL, alpha=2.0)
    method, assistant = pair_of(config)
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), some_boxes(2, 1)
    asked = ask(batch, assistant.asking)
    attention, its, _ = assistant.decoder.look(asked, teacher.pyramid, fake.STRIDES, batch.geometry)
    cells = torch.cat([x.flatten(2).transpose(1, 2) for x in student.pyramid], dim=1)
    project = assistant.decoder.value if values == "shared" else method.project.project
    assert project is not None
    mine = project(cells)
    expected = 0.0
    for b in range(2):
        for head in range(2):
            for u in range(cells.shape[1]):
                weight = sum(attention[b, head, q, u].item() for q in asked.real[b].nonzero())
                a, t = (normal(x[b, u, 4 * head : 4 * head + 4]) for x in (mine, its))
                expected += weight * sum((x - y) ** 2 for x, y in zip(a, t, strict=True)) / 4
    found = fake.run(method, student, teacher, batch, assistant=assistant)["feat"]
    assert found.item() == pytest.approx(2 * expected / (2 * 3), rel=1e-5)


def normal(values: Tensor) -> list[float]:
    found = values.double().tolist()
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in found) / len(found) + 1e-5)
    return [(x - mean) / deviation for x in found]


def test_cells_without_attention_are_not_imitated() -> None:
    """The mask is the decoder's: where it looks at nothing but one object's place, the rest may differ."""
    method, assistant = pair_of(Config(values="shared", decoder=SMALL))
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), some_boxes(1)
    told = fake.advised(assistant, student, teacher, batch)
    attention = torch.zeros_like(told.notes["attention"])
    attention[0, :, 7] = 1
    told = replace(told, notes={**told.notes, "attention": attention})
    moved = tuple(x.clone() for x in student.pyramid)
    moved[1].add_(1)
    before, after = (
        method.losses(taps, fake.FakeDetector().predict(taps.pyramid, batch.geometry), teacher, batch, told)["feat"]
        for taps in (student, Taps(student.c5, moved))
    )
    assert before == after > 0


def test_weights_are_the_papers_by_family_and_missing_advice_is_named() -> None:
    assert Loss(Config(), fake.pair()).alpha == 8
    assert Loss(Config(), fake.pair(student=replace(fake.SHAPES, family="two_stage"))).alpha == 3
    assert fake.run(Loss(Config(alpha=0.0), fake.pair()), fake.taps(1, 1), fake.taps(1, 2), fake.batch(1)) == {}
    assert not Config(alpha=0.0).assisted
    with pytest.raises(ValueError, match="needs its assistant's attention"):
        fake.run(Loss(Config(), fake.pair()), fake.taps(1, 1), fake.taps(1, 2), fake.batch(1))


@pytest.mark.parametrize("settings", [{"heads": 3}, {"fakes": 0}, {"clip": 0.0}, {"learning_rate": 0.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"decoder\."):
        DecoderConfig(**settings)
