"""Methods that read foreground alone, and FitNet's hints on it against their formula written out in loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, StoredTaps, Taps
from data_sharding.codecs.catalogue import codec, stack
from data_sharding.codecs.foreground import foreground_cells
from data_sharding.world import World
from kd.distiller import Distiller, Lesson
from kd.methods import fitnet
from kd.methods.base import Method, MethodConfig
from kd.plugins import plugins
from kd.step import global_totals
from kd.teacher import CachedTeacher
from tests.kd import fake

MASKED = fitnet.Config(foreground=True)
FOREGROUND: dict[str, MethodConfig] = {
    **{name: module.Config() for name, module in plugins("kd.methods").items() if module.Config().sparse_suffices},
    "fitnet": MASKED,
}
"""Every method that says that it reads no more than foreground, in its settings as such."""
BOXES = (
    torch.tensor([[4.0, 4.0, 20.0, 30.0], [50.0, 10.0, 90.0, 80.0]]),
    torch.zeros(0, 4),
    torch.tensor([[100.0, 60.0, 103.0, 65.0]]),
)


def batch(which: slice = slice(None)) -> Batch:
    boxes = BOXES[which]
    labels = tuple(torch.zeros(len(b), dtype=torch.int64) for b in boxes)
    return replace(fake.batch(len(boxes)), boxes=boxes, labels=labels)


def counted(method: Method, name: str, config: MethodConfig, *batches: Batch) -> list[Batch]:
    """Batches that know the counts of the global batch which they make up."""
    distiller = Distiller(fake.FakeDetector(), {name: (Lesson(name=name, teacher="t", config=config), method)})
    totals = global_totals(distiller, list(batches), World())
    return [one.with_totals(totals) for one in batches]


def built(name: str) -> Method:
    torch.manual_seed(0)
    return plugins("kd.methods")[name].Loss(FOREGROUND[name], fake.pair())


def masks(of: Batch, enlarged: float | None) -> tuple[Tensor, ...]:
    assert enlarged is not None
    return foreground_cells(of.boxes, of.geometry.canvas, fake.STRIDES, enlarged)


@pytest.mark.parametrize("name", FOREGROUND)
def test_nothing_outside_of_the_foreground_is_read(name: str) -> None:
    """So a sparse cache, which gives zeros there, gives the same losses to the bit as a dense one."""
    method, (of,) = built(name), counted(built(name), name, FOREGROUND[name], batch())
    student, teacher = fake.taps(3, 1), fake.taps(3, 2)
    kept = masks(of, FOREGROUND[name].reads_within)
    emptied = tuple(torch.where(m[:, None], x, 0.0) for x, m in zip(teacher.pyramid, kept, strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(teacher.pyramid, emptied, strict=True))
    whole = fake.run(method, student, teacher, of)
    assert whole
    for term, value in fake.run(method, student, Taps(None, emptied), of).items():
        assert torch.equal(value, whole[term])
        assert value > 0


@pytest.mark.parametrize("name", FOREGROUND)
def test_without_boxes_the_loss_is_zero_and_finite(name: str) -> None:
    method, (of,) = built(name), counted(built(name), name, FOREGROUND[name], batch(slice(1, 2)))
    student = fake.require_grad(fake.taps(1, 1))
    terms = fake.run(method, student, fake.taps(1, 2), of)
    assert terms
    torch.stack(list(terms.values())).sum().backward()
    assert all(term == 0 for term in terms.values())
    assert all(x.grad is not None and (x.grad == 0).all() for x in student.pyramid)


def test_hints_on_foreground_are_a_mean_over_its_positions() -> None:
    """The 1x1 convolution starts as the identity."""
    student, teacher = fake.taps(3, 1), fake.taps(3, 2)
    method, (of,) = built("fitnet"), counted(built("fitnet"), "fitnet", MASKED, batch())
    expected = 0.0
    for s, t, mask in zip(student.pyramid, teacher.pyramid, masks(of, 1.2), strict=True):
        errors = [float((s[b, :, i, j] - t[b, :, i, j]).square().mean()) for b, i, j in mask.nonzero().tolist()]
        expected += sum(errors) / len(errors)
    assert fake.run(method, student, teacher, of)["feat"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", FOREGROUND)
def test_shares_of_micro_batches_sum_to_the_loss_of_the_whole(name: str) -> None:
    """Although the images have unequal numbers of positions, one none."""
    student, teacher, method = fake.taps(3, 1), fake.taps(3, 2), built(name)
    (whole,) = counted(method, name, FOREGROUND[name], batch())
    parts = counted(method, name, FOREGROUND[name], batch(slice(0, 1)), batch(slice(1, 3)))
    total = torch.stack(list(fake.run(method, student, teacher, whole).values()))
    found = [
        torch.stack(list(fake.run(method, fake.rows(student, rows), fake.rows(teacher, rows), part).values()))
        for rows, part in zip((slice(0, 1), slice(1, 3)), parts, strict=True)
    ]
    torch.testing.assert_close(torch.stack(found).sum(0), total)


@pytest.mark.parametrize("per", ["channel", "position"])
def test_a_sparse_cache_teaches_what_dense_int8_of_the_same_positions_does(per: str) -> None:
    """Through the cached teacher: rows of foreground in, the very loss of the masked maps out."""
    student, teacher, method = fake.taps(3, 1), fake.taps(3, 2), built("fitnet")
    (of,) = counted(method, "fitnet", MASKED, batch())
    kept = masks(of, 1.2)
    losses = []
    for name in (f"sparse_{per}", f"int8_{per}"):
        pyramid = []
        for x, mask in zip(teacher.pyramid, kept, strict=True):
            encoded = [codec(name).encode(x[i] * mask[i], mask[i], level="p") for i in range(3)]
            pyramid.append(stack(codec(name), encoded, (x.shape[1], x.shape[2], x.shape[3]), level="p"))
        stored = replace(of, cached={"t": StoredTaps(None, tuple(pyramid))})
        losses.append(fake.run(method, student, CachedTeacher("t", fake.SHAPES)(stored), of)["feat"])
    assert torch.equal(losses[0], losses[1])
    assert losses[0].item() == pytest.approx(fake.run(method, student, teacher, of)["feat"].item(), rel=0.01)
