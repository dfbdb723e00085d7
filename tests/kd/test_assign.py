import pytest
import torch
from torch import Tensor

from kd.blocks import points as pts
from kd.blocks.assign import assign

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def matched(
    boxes: list[list[float]], canvas: tuple[int, int] = (64, 64), offset: float = 0.0, nearest: bool = True
) -> Tensor:
    """(L,) for one image at strides 8 and 16, radius 1.5."""
    points = pts.grid(canvas, (8, 16), offset, CPU)
    b = torch.tensor(boxes).reshape(-1, 4)
    image = torch.zeros(len(b), dtype=torch.int64)
    return assign(b, image, torch.tensor([canvas]), points, 1.5, nearest)[0]


def test_no_boxes_no_positives() -> None:
    assert (matched([]) == -1).all()


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (3.5, 3.5), (12.0, 29.0), (63.0, 63.0), (63.0, 0.0)])
def test_a_box_of_one_pixel_gets_its_nearest_location(corner: tuple[float, float], offset: float) -> None:
    box = [corner[0], corner[1], corner[0] + 1, corner[1] + 1]
    found = (matched([box], offset=offset) == 0).nonzero().flatten().tolist()
    points = pts.grid((64, 64), (8, 16), offset, CPU)
    centre = torch.tensor(corner) + 0.5
    assert len(found) == 1
    nearest = (points.xy[:64] - centre).abs().amax(dim=1)
    assert nearest[found[0]] == nearest.min()
    assert (matched([[3.5, 3.5, 4.5, 4.5]], nearest=False) == -1).all()


def test_every_box_of_any_shape_has_a_location_when_it_is_alone() -> None:
    corner, side = torch.rand(200, 2) * 50, torch.rand(200, 2) * torch.tensor([60.0, 14.0]) + 0.2
    for x1, y1, x2, y2 in torch.cat([corner, (corner + side).clamp(max=64)], dim=1).tolist():
        assert (matched([[x1, y1, x2, y2]]) == 0).any()


def test_the_smallest_box_wins_and_equal_boxes_go_to_the_first() -> None:
    big, small = [0.0, 0, 40, 40], [12.0, 12, 30, 30]
    assert torch.equal(matched([big, small]) == 1, matched([small, big]) == 0)
    assert (matched([small, small]) != 1).all()
    assert (matched([big, small]) == 1).sum() == (matched([small]) == 0).sum()


def test_levels_share_the_sizes_without_a_gap() -> None:
    # One location's farthest side is exactly at the border of two levels, 64 px: it belongs to the coarser one.
    strides = torch.tensor([8.0] * 1024 + [16.0] * 256)
    points = pts.grid((256, 256), (8, 16), 0.0, CPU)
    found = assign(
        torch.tensor([[0.0, 0, 128, 128]]), torch.tensor([0]), torch.tensor([[256, 256]]), points, 1.5, False
    )
    assert points.xy[found[0] == 0].tolist().count([64.0, 64.0]) == 1
    assert set(strides[found[0] == 0].tolist()) == {16.0}


def test_coding_is_its_own_inverse_and_centerness_peaks_in_the_middle() -> None:
    xy, stride = torch.tensor([[16.0, 8.0], [4.0, 4.0]]), torch.tensor([8.0, 4.0])
    boxes = torch.tensor([[6.0, 2, 26, 14], [5.0, 5, 6, 6]])
    distances = pts.encode(xy, stride, boxes)
    assert distances[0].tolist() == [1.25, 0.75, 1.25, 0.75]
    assert torch.equal(pts.decode(xy, stride, distances), boxes)
    assert pts.centerness(distances).tolist() == [1, 1]  # the middle; outside its box
    assert pts.centerness(torch.tensor([1.0, 1, 3, 1])) == pytest.approx(3**-0.5)
