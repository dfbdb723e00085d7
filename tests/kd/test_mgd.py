"""MGD against its formula in loops, its masks, and FitNet as its limit."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd.blocks.draw import chances
from kd.blocks.generate import Generator, masked
from kd.methods import fitnet
from kd.methods.mgd import Config, Loss
from tests.kd import fake


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of one image, cell by cell."""
    height, width = x.shape[1:]
    out = bias[:, None, None].repeat(1, height, width)
    for row in range(height):
        for column in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        out[:, row, column] += weight[:, :, dy + 1, dx + 1] @ x[:, row + dy, column + dx]
    return out


def test_the_loss_is_the_squared_error_of_what_is_generated_from_the_unmasked_cells() -> None:
    torch.manual_seed(0)
    canvas, batch = (32, 48), replace(fake.batch(2, canvas=(32, 48), first=7), key=(3, 1))
    student, teacher = fake.taps(2, 1, canvas=canvas), fake.taps(2, 2, canvas=canvas)
    method = Loss(Config(alpha=0.5, masked=0.4), fake.pair())
    expected = 0.0
    for level, (s, t, generator) in enumerate(zip(student.pyramid, teacher.pyramid, method.generators, strict=True)):
        first, second = (x.double() for x in (generator[0].weight, generator[2].weight))  # pyright: ignore
        biases = [generator[i].bias.detach().double() for i in (0, 2)]  # pyright: ignore
        for i, image in enumerate(batch.image_ids):
            keep = chances((3, 1, "mgd", level), [image], s.shape[2:])[0] >= 0.4  # pyright: ignore
            hidden = convolved(s[i].double() * keep, first.detach(), biases[0]).clamp(min=0)
            expected += 0.5 * (convolved(hidden, second.detach(), biases[1]) - t[i].double()).square().sum().item() / 2
    assert fake.run(method, student, teacher, batch)["feat"].item() == pytest.approx(expected, rel=1e-5)


def test_nothing_masked_and_no_generator_is_the_sum_of_fitnets_squares() -> None:
    student, teacher, batch = fake.taps(2, 1), fake.taps(2, 2), fake.batch(2)
    found = fake.run(Loss(Config(alpha=1.0, masked=0.0, layers=0), fake.pair()), student, teacher, batch)["feat"]
    levels = [
        (s.double() - t.double()).square().sum() / 2 for s, t in zip(student.pyramid, teacher.pyramid, strict=True)
    ]
    assert found.item() == pytest.approx(sum(x.item() for x in levels), rel=1e-5)
    # One level alone, which FitNet averages where MGD sums.
    cells = student.pyramid[0][0].numel()
    alone = [replace(x, pyramid=x.pyramid[:1]) for x in (student, teacher)]
    one = replace(fake.SHAPES, strides=(8,))
    hints = fake.run(fitnet.Loss(fitnet.Config(), fake.pair(one, one)), alone[0], alone[1], batch)["feat"]
    assert hints.item() * cells == pytest.approx(levels[0].item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.45, 0.65])
def test_the_masked_share_is_the_asked_one_and_whole_cells_are_masked(share: float) -> None:
    x = torch.ones(2, 3, 60, 80)
    left = masked(x, chances(("mgd",), [1, 2], (60, 80)), share)
    assert left.mean(dim=(2, 3)).flatten().tolist() == pytest.approx([1 - share] * 6, abs=0.03)
    assert torch.equal(left[:, 0], left[:, 2])
    assert share == 0 or not torch.equal(left[0], left[1])


def test_masks_follow_image_level_and_epoch_alone() -> None:
    def drawn(key: tuple[object, ...], images: list[int]) -> Tensor:
        return chances(key, images, (6, 9))

    assert torch.equal(drawn((0, 1), [4, 5])[1:], drawn((0, 1), [5]))
    assert not torch.equal(drawn((0, 1), [4]), drawn((0, 2), [4]))
    assert not torch.equal(drawn((0, 1), [4]), drawn((0, 1), [5]))
    method, batch = Loss(Config(), fake.pair()), fake.batch(1)
    taps = fake.taps(1, 1), fake.taps(1, 2)
    assert fake.run(method, *taps, batch) == fake.run(method, *taps, batch)
    assert fake.run(method, *taps, batch) != fake.run(method, *taps, replace(batch, key=(0, 1)))


def test_masked_cells_of_the_student_get_no_direct_gradient() -> None:
    student = fake.require_grad(fake.taps(1, 1))
    fake.run(Loss(Config(layers=0, masked=0.5), fake.pair()), student, fake.taps(1, 2), fake.batch(1))[
        "feat"
    ].backward()
    for level, x in enumerate(student.pyramid):
        gone = chances(("mgd", level), [0], x.shape[2:]) < 0.5  # pyright: ignore
        assert x.grad is not None
        assert torch.equal((x.grad == 0).all(dim=1), gone)


@pytest.mark.parametrize(("family", "chosen"), [("one_stage", (2e-5, 0.65)), ("two_stage", (5e-7, 0.45))])
def test_weights_are_the_papers_by_family_unless_given(family: str, chosen: tuple[float, float]) -> None:
    pair = fake.pair(student=replace(fake.SHAPES, family=family))
    loss, own = Loss(Config(), pair), Loss(Config(alpha=1.0, masked=0.1), pair)
    assert (loss.alpha, loss.masked) == chosen
    assert (own.alpha, own.masked) == (1.0, 0.1)
    assert fake.run(Loss(Config(alpha=0.0), pair), fake.taps(1, 1), fake.taps(1, 2), fake.batch(1)) == {}


def test_the_generator_has_the_teachers_width() -> None:
    method = Loss(Config(), fake.pair(teacher=fake.wider()))
    assert [tuple(p.shape) for p in method.generators[0].parameters() if p.ndim == 4] == [(16, 16, 3, 3)] * 2
    assert len(Generator(4, 0)) == 0


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"masked": 1.0}, {"masked": -0.1}, {"layers": -1}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)  # pyright: ignore[reportArgumentType]
