"""FKD: each of its terms against loops, and its non-local block."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kd.blocks.attention_maps import channel_attention, spatial_attention
from kd.blocks.divergence import distance, root
from kd.blocks.global_relation import NonLocal
from kd.methods.fkd import Config, Loss
from tests.kd import fake


def attention(x: Tensor, temperature: float) -> list[float]:
    """One image's (C, H, W) map -> the attention of its cells, row by row."""
    strength = [sum(abs(v) for v in cell) / len(cell) for cell in x.double().flatten(1).T.tolist()]
    parts = [math.exp(s / temperature) for s in strength]
    return [len(parts) * p / sum(parts) for p in parts]


def test_the_attended_distance_is_its_formula() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        for i in range(2):
            both = zip(attention(s[i], 0.5), attention(t[i], 0.5), strict=True)
            squares = (s[i].double() - t[i].double()).square().sum(dim=0).flatten().tolist()
            expected += 4e-4 * math.sqrt(sum((a + b) / 2 * e for (a, b), e in zip(both, squares, strict=True))) / 2
    found = fake.run(Loss(Config(), fake.pair()), student, teacher, fake.batch(2))["feat"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_means_are_compared_over_the_plane_and_over_the_channels() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        for i in range(2):
            d = s[i].double() - t[i].double()
            channels = [plane.mean().item() for plane in d]
            cells = [cell.mean().item() for cell in d.flatten(1).T]
            expected += 2e-2 * sum(math.sqrt(sum(v * v for v in values)) for values in (channels, cells)) / 2
    found = fake.run(Loss(Config(), fake.pair()), student, teacher, fake.batch(2))["means"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_relation_starts_as_the_distance_of_the_maps_and_then_tells_of_other_cells() -> None:
    torch.manual_seed(0)
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), fake.batch(2)
    method = Loss(Config(), fake.pair())
    plain = [
        (s[i].double() - t[i].double()).square().sum().sqrt().item()
        for s, t in zip(student.pyramid, teacher.pyramid, strict=True)
        for i in range(2)
    ]
    assert fake.run(method, student, teacher, batch)["relation"].item() == pytest.approx(
        4e-4 * sum(plain) / 2, rel=1e-5
    )
    for block in (*method.student_relation, *method.teacher_relation):
        nn.init.ones_(block.norm.weight)  # pyright: ignore
    related = fake.run(method, student, teacher, batch)["relation"]
    blocks = method.student_relation, method.teacher_relation
    s, t = (
        [b(x) for b, x in zip(bs, p.pyramid, strict=True)] for bs, p in zip(blocks, (student, teacher), strict=True)
    )
    expected = sum(distance(a, b).sum() for a, b in zip(s, t, strict=True))
    torch.testing.assert_close(related, 4e-4 * expected / 2)


@pytest.mark.parametrize("rate", [1, 2])
def test_the_non_local_block_is_its_formula(rate: int) -> None:
    torch.manual_seed(0)
    block, x = NonLocal(4, rate), torch.randn(1, 4, 3, 5)
    assert torch.equal(block(x), x), "the identity at first"
    nn.init.ones_(block.norm.weight)
    theta, phi, g = (
        torch.einsum("oc,chw->ohw", p.weight[..., 0, 0], x[0]) + p.bias[:, None, None]  # pyright: ignore
        for p in (block.theta, block.phi, block.g)
    )
    tiles = [(r, c) for r in range(0, 3, rate) for c in range(0, 5, rate)]
    phi, g = ([m[:, r : r + rate, c : c + rate].amax(dim=(1, 2)) for r, c in tiles] for m in (phi, g))
    mixed = torch.zeros(2, 3, 5)
    for row in range(3):
        for column in range(5):
            pairs = [(theta[:, row, column] @ p) * v for p, v in zip(phi, g, strict=True)]
            mixed[:, row, column] = torch.stack(pairs).mean(dim=0)
    told = torch.einsum("oc,chw->ohw", block.out.weight[..., 0, 0], mixed) + block.out.bias[:, None, None]  # pyright: ignore
    normal = (told - told.mean()) / (told.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(block(x)[0], x[0] + normal, rtol=1e-4, atol=1e-5)


def test_the_attention_is_a_weight_not_a_path_to_the_student() -> None:
    """Else the student could lower the loss by looking away."""
    student, teacher = fake.require_grad(fake.taps(1, 1)), fake.taps(1, 2)
    method = Loss(Config(means=0.0, relation=0.0), fake.pair())
    fake.run(method, student, teacher, fake.batch(1))["feat"].backward()
    for s, t in zip(student.pyramid, teacher.pyramid, strict=True):
        assert s.grad is not None
        weight = (spatial_attention(s.detach(), 0.5) + spatial_attention(t, 0.5)) / 2
        pull = (s.detach() - t) * weight
        torch.testing.assert_close(s.grad, 4e-4 * pull / distance(s.detach(), t, weight))


def test_attention_maps_have_mean_one_and_follow_the_temperature() -> None:
    x = fake.taps(2, 1).pyramid[0]
    for found in (spatial_attention(x, 0.5), channel_attention(x, 0.5)):
        assert found.flatten(1).mean(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert spatial_attention(x, 0.1).amax() > spatial_attention(x, 0.5).amax() > 1
    strength = x.double().abs().mean(dim=(2, 3))
    expected = 8 * (strength / 0.5).exp() / (strength / 0.5).exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(channel_attention(x, 0.5).flatten(1), expected.float())


def test_roots_of_nothing_have_no_gradient() -> None:
    sums = torch.tensor([0.0, 4.0], requires_grad=True)
    found = root(sums)
    found.sum().backward()
    assert found.tolist() == [0.0, 2.0]
    assert sums.grad is not None
    assert sums.grad.tolist() == [0.0, 0.25]


def test_weights_are_the_authors_by_family_and_rates_by_level() -> None:
    shapes = replace(fake.SHAPES, strides=(4, 8, 16, 32, 64), family="two_stage")
    loss = Loss(Config(relation=1.0), fake.pair(shapes, shapes))
    assert (loss.feature, loss.means, loss.relation) == (7e-5, 4e-3, 1.0)
    assert [block.rate for block in loss.student_relation] == [8, 4, 2, 2, 2]
    taps = fake.taps(1, 1), fake.taps(1, 2)
    assert set(fake.run(Loss(Config(means=0.0), fake.pair()), *taps, fake.batch(1))) == {"feat", "relation"}


@pytest.mark.parametrize("settings", [{"feature": -1.0}, {"means": -1.0}, {"temperature": 0.0}, {"rates": ()}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)  # pyright: ignore[reportArgumentType]
