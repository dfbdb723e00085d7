"""ScaleKD: its blocks against the paper's equations in loops, its settings, its assistant."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Taps
from kd.blocks.cross_attention import CrossAttention, Gather
from kd.blocks.position import sine_code
from kd.blocks.sdf import DecoupledError, DilatedBlock, ScaleDecoupled
from kd.methods.base import Advice
from kd.methods.scalekd import Assistant, Config, Csa, Loss, Sdf
from tests.kd import fake

SMALL = Sdf(width=8, token_width=4)


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def attention(
    student: int = 8, teacher: int = 8, heads: int = 2, rates: tuple[int, ...] = (2, 1), **wanted: Any
) -> CrossAttention:
    usual = {"roles": "eq", "residual": True, "zero_init": False, "position": True, "locality": None}
    settings: dict[str, Any] = usual | wanted
    return CrossAttention(student, teacher, heads, rates, **settings)


# ---- the paper's values


@pytest.mark.parametrize(("family", "weights"), [("one_stage", (0.01, 0.2, 0.05)), ("two_stage", (0.07, 0.5, 0.2))])
def test_weights_are_the_papers_unless_given(family: str, weights: tuple[float, ...]) -> None:
    pair = fake.pair(student=replace(fake.SHAPES, family=family))
    loss = Loss(Config(sdf=SMALL), pair)
    assert (loss.alpha, loss.beta, loss.gamma) == weights
    loss = Loss(Config(sdf=SMALL, alpha=0.5, beta=0.0), pair)
    assert (loss.alpha, loss.beta, loss.gamma) == (0.5, 0.0, weights[2])


def test_gates_are_the_papers_shares_of_90k_iterations() -> None:
    config = Config()
    assert (round(config.start * 90_000), round(config.freeze * 90_000)) == (30_000, 10_000)
    assert config.strength(0.33) == 0
    assert config.strength(0.34) == 1


def test_terms_of_weight_zero_are_left_out() -> None:
    student, teacher, batch = fake.taps(1, 1), fake.taps(1, 2), fake.batch(1)

    def terms(**weights: float) -> set[str]:
        return set(fake.run(Loss(Config(sdf=SMALL, **weights), fake.pair()), student, teacher, batch))  # pyright: ignore[reportArgumentType]

    assert terms() == {"feat", "cls", "box"}
    assert terms(alpha=0.0) == {"cls", "box"}
    assert terms(gamma=0.0) == {"feat", "cls"}
    assert terms(beta=0.0, gamma=0.0) == {"feat"}
    assert not Config(beta=0.0, gamma=0.0).assisted
    assert Config(beta=0.0).assisted
    assert Config(beta=0.0, gamma=0.0, csa=Csa(moves_head=True)).assisted, "it moves the head, whoever listens"


def test_output_terms_are_the_weighted_distillation_losses_of_the_detector() -> None:
    detector, batch = fake.FakeDetector(), fake.batch(2)
    student, advice = (detector.predict(fake.taps(2, seed).pyramid, batch.geometry) for seed in (1, 2))
    found = Loss(Config(sdf=SMALL, beta=0.5, gamma=0.25, alpha=0), fake.pair()).losses(
        fake.taps(2, 1), student, fake.taps(2, 3), batch, Advice(detector, advice)
    )
    expected = detector.distill_losses(student, advice, batch, "bounded")
    assert found == {"cls": 0.5 * expected["cls"], "box": 0.25 * expected["box"]}


def test_missing_advice_and_missing_c5_are_named() -> None:
    detector, batch, taps = fake.FakeDetector(), fake.batch(1), fake.taps(1, 1)
    outputs, loss = detector.predict(taps.pyramid, batch.geometry), Loss(Config(sdf=SMALL), fake.pair())
    with pytest.raises(ValueError, match="need its assistant's outputs"):
        loss.losses(taps, outputs, taps, batch, Advice(detector))
    with pytest.raises(ValueError, match="needs the teacher's c5"):
        loss.losses(taps, outputs, Taps(pyramid=taps.pyramid), batch, Advice(detector, outputs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Config(alpha=-1),
        lambda: Sdf(width=6),
        lambda: Sdf(dilations=()),
        lambda: Csa(heads=0),
        lambda: Csa(residual=False),
        lambda: Csa(learning_rate=0),
        lambda: Csa(rates=((0,),)),
        lambda: Csa(locality=0),
        lambda: Assistant(Config(csa=Csa(heads=4, rates=((1,),) * 4)), fake.pair()),
        lambda: Csa(head="own", moves_head=True),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|csa\.zero_init|at least 4 channels"):
        make()


# ---- SDF


def test_on_the_pyramid_the_feature_loss_sums_levels_and_needs_no_c5() -> None:
    student, teacher = (Taps(pyramid=fake.taps(2, seed).pyramid) for seed in (1, 2))
    loss = Loss(Config(sdf=replace(SMALL, on="pyramid"), alpha=0.5, beta=0.0, gamma=0.0), fake.pair())
    found = fake.run(loss, student, teacher, fake.batch(2))["feat"]
    levels = [loss.features(s, t).mean() for s, t in zip(student.pyramid, teacher.pyramid, strict=True)]
    torch.testing.assert_close(found, 0.5 * torch.stack(levels).sum())
    assert len(levels) > 1


@pytest.mark.parametrize("on", ["c5", "pyramid"])
def test_sides_that_begin_alike_tell_maps_apart_and_not_themselves(on: Any) -> None:
    taps, other = fake.taps(2, 1), fake.taps(2, 2)

    def feat(teacher: Taps, **sdf: Any) -> float:
        config = Config(sdf=replace(SMALL, on=on, **sdf), alpha=1.0, beta=0.0, gamma=0.0)
        return fake.run(Loss(config, fake.pair()), taps, teacher, fake.batch(2))["feat"].item()

    assert feat(taps) == 0
    assert feat(other) > 0
    assert feat(taps, same_start=False) > 0


def test_sides_of_other_widths_begin_alike_behind_their_adapters() -> None:
    part = Loss(Config(sdf=SMALL), fake.pair(teacher=fake.wider())).features
    assert part.teacher_sdf is not None
    mine, theirs = part.student_sdf.state_dict(), part.teacher_sdf.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(p.requires_grad for p in part.student_sdf.parameters())
    assert not any(p.requires_grad for p in part.teacher_sdf.parameters())


def test_the_feature_loss_sums_channels_and_averages_positions_and_images() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    loss = Loss(Config(sdf=SMALL, alpha=1.0, beta=0.0, gamma=0.0), fake.pair())
    part = loss.features
    assert part.teacher_adapter is not None
    assert part.teacher_sdf is not None
    with torch.no_grad():
        mine = part.student_sdf(part.student_adapter(student.c5)).double()
        theirs = part.teacher_sdf(part.teacher_adapter(teacher.c5)).double()
    assert mine.shape[1] == 3 * SMALL.token_width
    expected = 0.0
    images, channels, height, width = mine.shape
    for i in range(images):
        for y in range(height):
            for x in range(width):
                expected += sum((mine[i, c, y, x] - theirs[i, c, y, x]).item() ** 2 for c in range(channels))
    found = fake.run(loss, student, teacher, fake.batch(2))["feat"].item()
    assert found == pytest.approx(expected / (images * height * width), rel=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_a_branch_is_a_residual_bottleneck_with_a_dilated_middle(dilation: int) -> None:
    block, x = DilatedBlock(8).double(), torch.randn(1, 8, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        found = block(x, dilation)[0]
        parts: Any = (block.reduce, block.spread, block.expand)
        w1, w2, w3 = parts
        for y, z in ((0, 0), (2, 3), (4, 5)):
            middle = w2.bias.clone()
            for i in range(3):
                for j in range(3):
                    row, column = y + (i - 1) * dilation, z + (j - 1) * dilation
                    if 0 <= row < 5 and 0 <= column < 6:
                        reduced = (w1.weight[:, :, 0, 0] @ x[0, :, row, column] + w1.bias).clamp(min=0)
                        middle += w2.weight[:, :, i, j] @ reduced
            expected = x[0, :, y, z] + w3.weight[:, :, 0, 0] @ middle.clamp(min=0) + w3.bias
            torch.testing.assert_close(found[:, y, z], expected)


def test_sharing_keeps_one_third_of_the_branch_weights() -> None:
    shared, own = (ScaleDecoupled(8, 4, (1, 2, 3), sharing) for sharing in (True, False))
    count = [sum(p.numel() for p in sdf.blocks.parameters()) for sdf in (shared, own)]
    assert count[0] * 3 == count[1]
    assert shared(torch.randn(1, 8, 3, 5)).shape == own(torch.randn(1, 8, 3, 5)).shape == (1, 12, 3, 5)


def error(side: str, student: int = 8, teacher: int = 8, seed: int = 0) -> DecoupledError:
    return DecoupledError(student, teacher, 8, 4, (1, 2, 3), weight_sharing=True, teacher_side=side, seed=seed)  # pyright: ignore[reportArgumentType]


def teachers(module: DecoupledError) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if name.startswith("teacher")}


def test_the_frozen_teacher_side_depends_on_the_settings_alone() -> None:
    first = error("frozen", teacher=12)
    torch.manual_seed(1234)
    second, other = error("frozen", student=16, teacher=12), error("frozen", teacher=12, seed=1)
    assert teachers(first)
    for name, p in teachers(first).items():
        assert not p.requires_grad
        assert torch.equal(p, teachers(second)[name])
    assert any(not torch.equal(p, teachers(other)[name]) for name, p in teachers(first).items())
    weight = first.get_parameter("teacher_adapter.0.weight").flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)


def test_a_shared_side_learns_from_the_student_alone_and_a_trained_one_from_both() -> None:
    x, y = torch.randn(1, 8, 3, 5), torch.randn(1, 8, 3, 5)
    shared = error("shared")
    assert teachers(shared) == {}
    assert shared(x, x).abs().max() == 0
    assert shared(x, y).mean() > 0
    uneven = error("shared", teacher=12)
    assert set(teachers(uneven)) == {f"teacher_adapter.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    trained = error("trained")
    trained(x, y).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in teachers(trained).values())


def test_shared_tokens_are_standardised_so_that_shrinking_them_gains_nothing() -> None:
    shared, x, y = error("shared"), torch.randn(1, 8, 3, 5), torch.randn(1, 8, 3, 5)
    before = shared(x, y)
    for tokens in shared.student_sdf.tokens:
        for p in tokens.get_submodule("2").parameters():
            p.data *= 0.1
    torch.testing.assert_close(shared(x, y), before, rtol=0.02, atol=0)


@pytest.mark.parametrize("side", ["frozen", "shared", "trained"])
def test_no_teacher_side_sends_gradient_into_the_teacher(side: str) -> None:
    teacher = fake.require_grad(fake.taps(1, 2))
    loss = Loss(Config(sdf=replace(SMALL, teacher=side), alpha=1.0), fake.pair())
    fake.run(loss, fake.require_grad(fake.taps(1, 1)), teacher, fake.batch(1))["feat"].backward()
    assert all(x.grad is None for x in fake.tensors(teacher))


def test_unaligned_c5_are_named() -> None:
    with pytest.raises(ValueError, match=r"c5 has \(3, 5\) cells, the teacher's \(6, 10\)"):
        error("frozen")(torch.randn(1, 8, 3, 5), torch.randn(1, 8, 6, 10))


# ---- CSA


@pytest.mark.parametrize("teacher", [fake.SHAPES, fake.wider()], ids=["equal", "wider"])
def test_the_assistant_starts_as_the_student_itself(teacher: fake.Shapes) -> None:
    assistant = Assistant(Config(csa=Csa(heads=2)), fake.pair(teacher=teacher))
    student = fake.taps(2, 1).pyramid
    found = assistant(student, fake.taps(2, 2, teacher).pyramid)
    assert all(torch.equal(a, b) for a, b in zip(found, student, strict=True))


@pytest.mark.parametrize("roles", ["eq", "text"])
def test_attention_is_the_papers_equations(roles: str) -> None:
    """Eqs. 3-6 in loops, one head after the other, on a grid that the rate does not divide; in the student's units."""
    level = attention(teacher=12, roles=roles, residual=True).double()
    student, teacher = (torch.randn(1, c, 3, 5, dtype=torch.float64) for c in (8, 12))
    with torch.no_grad():
        s, t = level.norm_student(student), level.norm_teacher(level.enter(teacher))
        asks, answers, contents = (s, t, t) if roles == "eq" else (t, t, s)
        heads = [_head(group, asks, answers, contents) for group in level.groups]
        out: Any = level.out
        mixed = torch.cat(heads, dim=1) @ out.weight[:, :, 0, 0].T + out.bias
        expected = student + student.square().mean().sqrt() * mixed.T.reshape(1, 8, 3, 5)
        torch.testing.assert_close(level(student, teacher), expected, rtol=1e-5, atol=1e-6)


def _head(group: Any, asks: Tensor, answers: Tensor, contents: Tensor) -> Tensor:
    """One head at one rate, cell by cell: (cells, head width)."""
    keys, values = group.gather(answers), group.gather(contents)
    height, width = keys.shape[-2:]
    cells = [(y, x) for y in range(height) for x in range(width)]
    k = [group.key(keys[0, :, y, x]) + group.key_place(_code(y, x, group.rate)) for y, x in cells]
    plain = {(y, x): group.value(values[0, :, y, x]) for y, x in cells}
    v = []
    for y, x in cells:
        local = group.local.bias.clone()
        for i in range(3):
            for j in range(3):
                if (y + i - 1, x + j - 1) in plain:
                    local += group.local.weight[:, 0, i, j] * plain[y + i - 1, x + j - 1]
        v.append(plain[y, x] + local)
    found = []
    for y in range(asks.shape[2]):
        for x in range(asks.shape[3]):
            q = group.query(asks[0, :, y, x]) + group.query_place(_code(y, x, 1))
            scores = [math.exp((q @ key).item() / math.sqrt(len(q))) for key in k]
            found.append(sum((a / sum(scores) * value for a, value in zip(scores, v, strict=True)), start=0 * v[0]))
    return torch.stack(found)


def _code(y: int, x: int, cell: int) -> Tensor:
    """The sine code of eight channels at one cell."""
    places = [(place + 0.5) * cell for place in (y, x)]
    waves = [wave(place * f) for place in places for wave in (math.sin, math.cos) for f in (1.0, 0.01)]
    return torch.tensor(waves, dtype=torch.float64)


def test_rates_follow_the_stride_and_split_the_heads() -> None:
    shapes = replace(fake.SHAPES, strides=(4, 8, 16, 32, 64, 128))

    def rates(**csa: Any) -> list[list[int]]:
        assistant = Assistant(Config(csa=Csa(heads=2, **csa)), fake.pair(shapes, shapes))
        return [[group.rate for group in level.groups] for level in assistant.levels]  # pyright: ignore

    assert rates() == [[16, 8], [8, 4], [4, 2], [2, 1], [1], [1]]
    assert rates(multi_scale=False) == [[16], [8], [4], [2], [1], [1]]
    with pytest.raises(ValueError, match="none is for stride 8"):
        rates(rates=((4, 2),))


@pytest.mark.parametrize("heads", [3, 1, 16])
def test_heads_that_do_not_fit_are_named(heads: int) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads must divide the student's pyramid width 8"):
        Assistant(Config(csa=Csa(heads=heads)), fake.pair())


def test_gathering_rounds_up_and_rate_one_is_the_identity() -> None:
    x = torch.randn(1, 8, 5, 9)
    assert torch.equal(Gather(8, 1)(x), x)
    assert Gather(8, 4)(x).shape == (1, 8, 2, 3)
    assert Gather(8, 16)(x).shape == (1, 8, 1, 1)


@pytest.mark.parametrize("changed", [{"residual": False}, {"position": False}, {"roles": "text"}], ids=str)
def test_settings_change_the_attention(changed: dict[str, Any]) -> None:
    student, teacher = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    usual, other = attention(), attention(**changed)
    other.load_state_dict(usual.state_dict(), strict="position" not in changed)
    assert not torch.allclose(usual(student, teacher), other(student, teacher), atol=1e-4)
    assert other(student, teacher).shape == student.shape


def test_without_a_code_moving_the_teachers_cells_moves_nothing_and_with_it_does() -> None:
    """At rate 1 attention alone is blind to place; the depth-wise term, made blind here too, is the other eye."""
    student, teacher = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    for position in (False, True):
        level = attention(rates=(1,), position=position)
        level.get_submodule("groups.0.local").requires_grad_(False).weight.zero_()  # pyright: ignore
        same = torch.allclose(level(student, teacher), level(student, teacher.flip(3)), atol=1e-5)
        assert same is not position


@pytest.mark.parametrize(("width", "heads", "rate"), [(256, 8, 1), (256, 8, 4), (32, 8, 1), (64, 2, 2)])
def test_attention_begins_at_each_cells_own_place(width: int, heads: int, rate: int) -> None:
    """Half of the weight lies on the key over the cell itself, or on it and the ones that it lies between."""
    level = CrossAttention(
        width, width, heads, (rate,), roles="eq", residual=True, zero_init=True, position=True, locality=0.35
    )
    group: Any = level.groups[0]
    grid, keys = (sine_code(n, n, width, cell, torch.device("cpu")) for n, cell in ((24, 1), (24 // rate, rate)))
    q, k = (
        place(code.flatten(2).mT).unflatten(2, (heads, -1)).transpose(1, 2)
        for place, code in ((group.query_place, grid), (group.key_place, keys))
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).unflatten(3, (24 // rate, 24 // rate))[0]
    for y, x in ((0, 0), (13, 7), (23, 11)):
        near = weights[:, y * 24 + x, max(0, y // rate - 1) : y // rate + 2, max(0, x // rate - 1) : x // rate + 2]
        assert near.sum((1, 2)).min() > 0.5


def test_one_step_teaches_every_part_of_the_assistant_and_leaves_the_head_alone() -> None:
    assistant = Assistant(Config(csa=Csa(heads=2, zero_init=False)), fake.pair(teacher=fake.wider()))
    detector, batch, optimizer = fake.FakeDetector(), fake.batch(2), assistant.optimizer()
    head = {name: p.clone() for name, p in detector.named_parameters()}
    pyramid = assistant(fake.taps(2, 1).pyramid, fake.taps(2, 2, fake.wider()).pyramid)
    loss = detector.task_losses(detector.predict(pyramid, batch.geometry), batch)["cls"]
    parameters = dict(assistant.named_parameters())
    for p, gradient in zip(parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
        p.grad = gradient
    dead = [name for name, p in parameters.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # The same amount added to every key moves no softmax: a key's bias has no gradient but rounding.
    assert [name for name in dead if not name.endswith("key.bias")] == []
    optimizer.step()
    assert all(torch.equal(p, head[name]) for name, p in detector.named_parameters())
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (3e-4, 1e-4)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)


def test_gated_assistants_learn_only_while_the_method_is_on() -> None:
    always, gated = (Assistant(Config(csa=Csa(heads=2, start=start)), fake.pair()) for start in ("always", "gated"))
    assert [a.learns(on) for a in (always, gated) for on in (False, True)] == [True, True, False, True]
    assert always.refresh
    assert not Assistant(Config(csa=Csa(heads=2, refresh=False)), fake.pair()).refresh


def test_the_assistants_answer_follows_the_teachers_images() -> None:
    level = attention()
    student, teacher = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    assert not torch.allclose(level(student, teacher), level(student, teacher.flip(0)), atol=1e-4)
    torch.testing.assert_close(level(student, teacher)[:1], level(student[:1], teacher[:1]))


def test_the_assistant_reaches_as_far_on_a_large_pyramid_as_on_a_small_one() -> None:
    """A pyramid's levels have no normaliser: what CSA adds grows with them, or it would be lost in a large one."""
    level = attention(teacher=12, roles="eq", residual=True).double()
    student, teacher = (torch.randn(1, c, 4, 4, dtype=torch.float64) for c in (8, 12))
    with torch.no_grad():
        small, large = level(student, teacher) - student, level(100 * student, teacher) - 100 * student
    torch.testing.assert_close(large, 100 * small, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("decay", "shrinks"), [("decoupled", False), ("coupled", True)])
def test_without_gradient_only_coupled_decay_moves_the_assistant_at_its_learning_rate(
    decay: Any, shrinks: bool
) -> None:
    assistant = Assistant(Config(csa=Csa(heads=2, decay=decay)), fake.pair())
    before = [p.detach().clone() for p in assistant.parameters()]
    optimizer = assistant.optimizer()
    for parameter in assistant.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = max((p - b).abs().max().item() for p, b in zip(assistant.parameters(), before, strict=True))
    assert (moved > 1e-4) == shrinks


def test_a_head_of_its_own_needs_someone_to_make_it() -> None:
    with pytest.raises(ValueError, match=r"csa\.head 'own' needs Pair\.detector"):
        Assistant(Config(csa=Csa(heads=2, head="own")), fake.pair())


@pytest.mark.parametrize("norm", [True, False])
def test_normalising_is_a_setting(norm: bool) -> None:
    """Without, a hundred times as large a teacher is asked and answers otherwise; with it, nothing changes."""
    level = attention(norm=norm).double()
    student, teacher = (torch.randn(1, 8, 4, 4, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        found, scaled = level(student, teacher), level(student, 100 * teacher)
    assert torch.allclose(found, scaled, rtol=1e-3, atol=1e-3) == norm
