"""Faster R-CNN alone: torchvision's losses, its draws, its proposals, its own settings."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kd.blocks.draw import draw
from kd.blocks.region_targets import anchor_targets, drawn_regions, region_targets
from kd.blocks.rois import pool
from kd.detectors import faster_rcnn
from kd.detectors.faster_rcnn import FasterRCNN
from tests.kd.detecting import SOME, batch, config, counted, outputs_of, part_of, pyramid_of, seen_by


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these maps are too small to share
    yield
    torch.set_num_threads(threads)


def tiny(**changes: Any) -> FasterRCNN:
    return faster_rcnn.build(config(faster_rcnn, **changes), 3)


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(0, 0, (0, 0)), (0, 9, (0, 8)), (2, 9, (2, 6)), (9, 9, (4, 4)), (9, 0, (4, 0)), (9, 1, (4, 1))],
)
def test_a_draw_takes_what_is_there_up_to_its_share(positive: int, negative: int, expected: tuple[int, int]) -> None:
    members = torch.arange(20)
    yes, no = members < positive, (members >= 9) & (members < 9 + negative)
    chosen = draw(yes, no, 8, 0.5, (0, "anchors", 7))
    assert (int((chosen & yes).sum()), int((chosen & no).sum())) == expected
    assert not (chosen & ~yes & ~no).any()


def test_draws_follow_from_run_epoch_purpose_and_image_alone() -> None:
    every = torch.ones(100, dtype=torch.bool)

    def drawn(*key: object) -> torch.Tensor:
        torch.rand(3)
        return draw(every, ~every, 20, 1.0, key)

    assert torch.equal(drawn(0, 1, "anchors", 7), drawn(0, 1, "anchors", 7))
    for other in ((1, 1, "anchors", 7), (0, 2, "anchors", 7), (0, 1, "regions", 7), (0, 1, "anchors", 8)):
        assert not torch.equal(drawn(0, 1, "anchors", 7), drawn(*other))


def test_draws_of_a_batch_are_those_of_its_images() -> None:
    d, whole = tiny(), batch(SOME, key=(3, 5))
    with torch.no_grad():
        proposals = seen_by(d, whole).proposals
    for i in range(2):
        part = part_of(whole, slice(i, i + 1))
        mine = drawn_regions(proposals[i : i + 1], part, 16, 0.25)[0]
        assert torch.equal(mine, drawn_regions(proposals, whole, 16, 0.25)[i])
        anchors = d._anchors(whole.geometry)
        assert torch.equal(anchor_targets(anchors, part, 64).drawn[0], anchor_targets(anchors, whole, 64).drawn[i])
    later = drawn_regions(proposals, replace(whole, key=(3, 6)), 16, 0.25)
    assert any(not torch.equal(a, b) for a, b in zip(later, drawn_regions(proposals, whole, 16, 0.25), strict=True))


def test_regions_by_hand() -> None:
    """Two boxes of classes 0 and 1; one ignored region."""
    b = batch(
        [[[0.0, 0, 10, 10], [20.0, 20, 40, 40]], []], ignore=(torch.tensor([[60.0, 60, 80, 80]]), torch.zeros(0, 4))
    )
    regions = torch.tensor([[0.0, 0, 10, 12], [22.0, 22, 40, 40], [0.0, 0, 30, 30], [62.0, 62, 78, 78]])
    found = region_targets((regions, regions[:1]), b)
    assert found.labels.tolist() == [1, 2, 0, 0, 0]
    assert found.counted.tolist() == [True, True, True, False, True]
    assert found.truth.tolist() == [[0, 0, 10, 10], [20, 20, 40, 40]]
    drawn = drawn_regions((regions, regions[:1]), b, 100, 0.5)
    assert [len(x) for x in drawn] == [5, 1], "boxes are among them, what is ignored is not"


def test_without_any_region_every_loss_is_zero_or_the_first_stages() -> None:
    d = tiny()
    b = counted(d, batch([[], []]))
    nothing = (torch.zeros(0, 4), torch.zeros(0, 4))
    outputs = d.predict(pyramid_of(d, b), b.geometry, proposals=nothing)
    losses = d.task_losses(outputs, b)
    assert losses["cls"] == losses["box"] == losses["rpn_box"] == 0
    assert losses["rpn_cls"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert [n for n, p in d.named_parameters() if p.grad is None] == [], "ZeRO waits for each of them"
    assert all(not len(one.boxes) for one in d.detect(outputs, b.geometry))
    terms = d.distill_losses(outputs, outputs.detach(), b, "bounded")
    assert all(term.item() == pytest.approx(0, abs=1e-9) for term in terms.values())


def test_a_target_of_other_proposals_is_refused() -> None:
    d = tiny()
    b = counted(d, batch(SOME))
    with pytest.raises(ValueError, match="give predict the student's"):
        d.distill_losses(outputs_of(d, b), seen_by(d, b).detach(), b, "bounded")


def test_regions_are_pooled_from_the_level_of_their_size() -> None:
    """A box of 14 cells' side belongs to a level; maps that say which level they are tell where it was pooled."""
    canvas = (520, 520)
    pyramid = tuple(torch.full((1, 1, -(-520 // s), -(-520 // s)), float(s)) for s in (4, 8, 16, 32, 64))
    boxes = torch.tensor([[8.0, 8, 8 + side, 8 + side] for side in (20, 56, 112, 224, 448, 500)])
    found = pool(pyramid, (boxes,), (4, 8, 16, 32, 64), canvas)
    assert found.shape == (6, 1, 7, 7)
    assert found.mean((1, 2, 3)).tolist() == [4, 4, 8, 16, 32, 32]
    assert pool(pyramid, (boxes[:0],), (4, 8, 16, 32, 64), canvas).shape == (0, 1, 7, 7)


@pytest.mark.parametrize("setting", [{"roi_samples": 0}, {"proposal_nms": 0.0}, {"anchor_sizes": ()}], ids=str)
def test_its_own_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        faster_rcnn.Config(**setting)
