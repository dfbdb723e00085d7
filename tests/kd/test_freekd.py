"""FreeKD: the wavelet, the prompts, the loss against loops, and what the prompts learn from."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Taps
from kd.blocks.frequency_prompt import FrequencyPrompt, overlap
from kd.blocks.haar import bands, restore
from kd.methods.base import Advice
from kd.methods.freekd import Assistant, Config, Loss
from tests.kd import fake

LEVELS = len(fake.STRIDES)


def details_in_loops(x: Tensor) -> tuple[Tensor, Tensor]:
    """One (C, H, W) map, halved once: smooth (C, h, w) and details (C, 3, h, w), tile by tile."""
    channels, height, width = x.shape
    h, w = math.ceil(height / 2), math.ceil(width / 2)
    low, high = torch.zeros(channels, h, w, dtype=x.dtype), torch.zeros(channels, 3, h, w, dtype=x.dtype)
    for row in range(h):
        for column in range(w):
            tile = torch.zeros(channels, 2, 2, dtype=x.dtype)
            part = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            tile[:, : part.shape[1], : part.shape[2]] = part
            (a, b), (c, d) = ((tile[:, y, 0], tile[:, y, 1]) for y in (0, 1))
            low[:, row, column] = (a + b + c + d) / 2
            high[:, :, row, column] = torch.stack([a + c - b - d, a + b - c - d, a + d - b - c], dim=1) / 2
    return low, high


def masks(seed: int, config: Config) -> dict[str, Tensor]:
    generator, notes = torch.Generator().manual_seed(seed), {}
    for level, x in enumerate(fake.taps(2, 1).pyramid):
        for i, details in enumerate(bands(x, config.halvings)[1]):
            notes[f"{level}/{i}"] = torch.rand(2, config.tokens, *details.shape[3:], generator=generator)
    return notes


def test_the_loss_is_the_weighed_distance_of_the_details_and_the_error_of_the_maps() -> None:
    student, teacher, config = fake.taps(2, 1), fake.taps(2, 2), Config(tokens=2)
    notes, expected = masks(3, config), {"feat": 0.0, "whole": 0.0}
    for level, (s, t) in enumerate(zip(student.pyramid, teacher.pyramid, strict=True)):
        expected["whole"] += 5 * (s.double() - t.double()).square().mean().item()
        for i in range(2):
            mine, its = s[i].double(), t[i].double()
            for halving in range(3):
                mine, mine_high = details_in_loops(mine)
                its, its_high = details_in_loops(its)
                weight = notes[f"{level}/{halving}"][i].double().sum(dim=0)
                expected["feat"] += ((mine_high - its_high).abs() * weight).mean().item() / 2
    detector = fake.FakeDetector()
    outputs = detector.predict(student.pyramid, fake.batch(2).geometry)
    found = Loss(config, fake.pair()).losses(student, outputs, teacher, fake.batch(2), Advice(detector, notes=notes))
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(8, 16), (12, 17), (5, 3), (1, 1)])
def test_the_transform_is_undone_exactly_and_keeps_the_energy(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    low, details = bands(x, 3)
    torch.testing.assert_close(restore(low, details, size), x)
    energy = low.square().sum() + torch.stack([high.square().sum() for high in details]).sum()
    torch.testing.assert_close(energy, x.square().sum())
    for image in range(2):
        once, high = details_in_loops(x[image])
        torch.testing.assert_close(bands(x, 1)[0][image], once)
        torch.testing.assert_close(details[0][image], high)


def test_a_constant_map_has_no_details() -> None:
    assert all(high.abs().max() == 0 for high in bands(torch.full((1, 2, 8, 8), 3.0), 3)[1])


def test_masks_are_sigmoids_of_tokens_with_the_added_details() -> None:
    torch.manual_seed(0)
    prompt, x = FrequencyPrompt(4, tokens=2, depth=1).requires_grad_(False), torch.randn(1, 4, 3, 2, 2)
    (found,) = prompt(x)
    for token in range(2):
        for row in range(2):
            for column in range(2):
                product = sum(prompt.tokens[0][token, c] * x[0, c, :, row, column].sum() for c in range(4))
                assert found[0, token, row, column].item() == pytest.approx(
                    1 / (1 + math.exp(-float(product))), rel=1e-5
                )


def test_tokens_that_point_at_the_same_places_overlap() -> None:
    apart = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    assert overlap(apart).item() == pytest.approx(0)
    assert overlap(apart[:, [0, 0]]).item() == pytest.approx(1)
    assert overlap(apart[:, :1]).item() == 0
    half = torch.tensor([[[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 1.0]]]])
    assert overlap(half).item() == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_a_new_assistant_shows_the_teachers_map_and_weighs_all_details_alike() -> None:
    torch.manual_seed(0)
    config, teacher = Config(), fake.taps(2, 2)
    assistant, scene = Assistant(config, fake.pair()), fake.scene(fake.taps(2, 1), teacher, fake.batch(2))
    with torch.no_grad():
        for prompt in assistant.prompts:
            for tokens in prompt.tokens:  # pyright: ignore
                tokens.zero_()
    advice = assistant.advise(assistant.watch(scene), scene)
    torch.testing.assert_close(advice.pyramid, teacher.pyramid)
    assert len(advice.notes) == 3 * LEVELS
    assert all((mask == 0.5).all() for mask in advice.notes.values())
    assert advice.outputs is not None


def test_the_prompts_learn_from_detection_and_from_their_overlap() -> None:
    torch.manual_seed(0)
    scene = fake.scene(fake.taps(2, 1), fake.taps(2, 2, fake.wider()), fake.batch(2))

    def gradient(apart: float) -> list[Tensor]:
        torch.manual_seed(0)
        assistant = Assistant(Config(apart=apart), fake.pair(teacher=fake.wider()))
        loss = assistant.loss(assistant.advise(assistant.watch(scene), scene), scene)
        return list(torch.autograd.grad(loss, list(assistant.parameters())))

    alone, both = gradient(0.0), gradient(1.0)
    assert all(g.abs().max() > 0 for g in alone)
    assert not torch.equal(alone[0], both[0])
    assert Assistant(Config(learning_rate=0.5), fake.pair()).optimizer().param_groups[0]["lr"] == 0.5


def test_the_masks_are_a_weight_not_a_path_to_the_prompts() -> None:
    student, teacher = fake.require_grad(fake.taps(2, 1)), fake.taps(2, 2)
    assistant = Assistant(Config(), fake.pair())
    fake.run(Loss(Config(), fake.pair()), student, teacher, fake.batch(2), assistant=assistant)["feat"].backward()
    assert all(p.grad is None for p in assistant.parameters())
    assert all(x.grad is not None for x in student.pyramid)


def test_what_is_smooth_is_left_to_the_maps_term() -> None:
    """A student that is off by the same everywhere, on sides that halve evenly, agrees in every detail."""
    canvas = (512, 256)
    teacher = fake.taps(1, 1, canvas=canvas)
    student = replace(teacher, pyramid=tuple(x + 1 for x in teacher.pyramid))
    batch = fake.batch(1, canvas=canvas)
    found = fake.run(Loss(Config(), fake.pair()), student, teacher, batch, assistant=Assistant(Config(), fake.pair()))
    assert found["feat"].item() == pytest.approx(0, abs=1e-5)
    assert found["whole"].item() == pytest.approx(5.0 * LEVELS, rel=1e-5)


def test_terms_of_weight_zero_are_left_out_and_nobody_is_asked() -> None:
    taps, batch = (Taps(None, fake.taps(1, seed).pyramid) for seed in (1, 2)), fake.batch(1)
    config = Config(frequency=0.0)
    assert set(fake.run(Loss(config, fake.pair()), *taps, batch)) == {"whole"}
    assert not config.assisted
    assert Config().assisted


@pytest.mark.parametrize("settings", [{"frequency": -1.0}, {"apart": -1.0}, {"tokens": 0}, {"learning_rate": 0.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)  # pyright: ignore[reportArgumentType]
