"""DRKD: its blocks and terms against loops."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kd.blocks.foreground import all_boxes
from kd.blocks.global_relation import GraphReasoning
from kd.blocks.instances import InstanceRelation, object_maps
from kd.methods.drkd import Config, Loss
from tests.kd import fake

BOXES = (
    torch.tensor([[4.0, 4.0, 20.0, 30.0], [50.0, 10.0, 90.0, 80.0]]),
    torch.tensor([[101.0, 33.0, 106.0, 38.0], [0.0, 60.0, 136.0, 96.0], [8.0, 8.0, 40.0, 40.0]]),
)


def sample(x: Tensor, column: float, row: float) -> Tensor:
    """(C, H, W) between cell centres, cells being at whole numbers, held at the border -> (C,)."""
    height, width = x.shape[1:]
    row, column = (min(max(v, 0.0), side - 1.0) for v, side in ((row, height), (column, width)))
    top, left = int(row), int(column)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = row - top, column - left
    upper = x[:, top, left] * (1 - dx) + x[:, top, right] * dx
    lower = x[:, below, left] * (1 - dx) + x[:, below, right] * dx
    return upper * (1 - dy) + lower * dy


def regions(x: Tensor, box: list[float], stride: int) -> Tensor:
    """(C, H, W) -> (C, 3, 3): each cell the mean of 2 x 2 places inside its ninth of the box."""
    x1, y1, x2, y2 = box
    w, h = (x2 - x1) / 3, (y2 - y1) / 3
    out = torch.zeros(x.shape[0], 3, 3, dtype=x.dtype)
    for row in range(3):
        for column in range(3):
            places = [(x1 + w * (column + a), y1 + h * (row + b)) for a in (0.25, 0.75) for b in (0.25, 0.75)]
            found = [sample(x, px / stride - 0.5, py / stride - 0.5) for px, py in places]
            out[:, row, column] = torch.stack(found).mean(dim=0)
    return out


def test_objects_are_sampled_where_they_lie() -> None:
    level, batch = fake.taps(2, 1).pyramid[0], replace(fake.batch(2), boxes=BOXES)
    boxes, image = all_boxes(batch)
    found = object_maps(level, boxes, image, 8, 3)
    expected = [regions(level[i].double(), box, 8) for i, of in enumerate(BOXES) for box in of.tolist()]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert object_maps(level.bfloat16(), boxes, image, 8, 3).dtype == torch.float32


def test_the_foreground_term_is_the_distance_of_the_objects_by_image_on_two_levels() -> None:
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    expected = 0.0
    for s, t, stride in list(zip(student.pyramid, teacher.pyramid, fake.STRIDES, strict=True))[:2]:
        for i, boxes in enumerate(BOXES):
            gaps = [regions(s[i].double() - t[i].double(), box, stride) for box in boxes.tolist()]
            expected += 2.4e-3 * sum(gap.square().sum().item() for gap in gaps) ** 0.5 / 2
    found = fake.run(Loss(Config(), fake.pair()), student, teacher, replace(fake.batch(2), boxes=BOXES))
    assert found["foreground"].item() == pytest.approx(expected, rel=1e-5)
    # Relations start as the maps themselves, so these terms begin alike.
    assert found["instance"].item() == pytest.approx(expected / 2.4e-3 * 5e-3, rel=1e-5)


def test_objects_relate_within_their_image_by_softmax_and_filter() -> None:
    torch.manual_seed(0)
    block, x, image = InstanceRelation(6, 4), torch.randn(5, 6), torch.tensor([0, 0, 1, 1, 1])
    assert torch.equal(block(x, image), x), "the identity at first"
    nn.init.normal_(block.out.weight)
    expected = []
    for i in range(5):
        mates = [j for j in range(5) if image[j] == image[i]]
        matter = torch.stack([block.matter(x[j])[0] for j in mates]).softmax(0)
        scores = [(block.theta(x[i]) @ block.phi(x[j])) * a for j, a in zip(mates, matter, strict=True)]
        told = sum(w * block.g(x[j]) for w, j in zip(torch.stack(scores).softmax(0), mates, strict=True))
        expected.append(x[i] + block.out.weight @ told + block.out.bias)
    torch.testing.assert_close(block(x, image), torch.stack(expected))
    assert block(x[:0], image[:0]).shape == (0, 6)
    torch.testing.assert_close(block(x, image)[2:], block(x[2:], image[2:]), msg="another image is looked at")


def test_the_graph_unit_is_its_formula() -> None:
    torch.manual_seed(0)
    block, x = GraphReasoning(4, nodes=3), torch.randn(1, 4, 2, 5)
    assert torch.equal(block(x), x), "the identity at first"
    nn.init.ones_(block.norm.weight)
    cells = x[0].flatten(1).T
    state, assign = (cells @ p.weight.flatten(1).T + p.bias for p in (block.state, block.assign))  # pyright: ignore
    nodes = sum(torch.outer(s, a) for s, a in zip(state, assign, strict=True)) / len(cells)  # states x nodes
    assert isinstance(nodes, Tensor)
    spoken = nodes + nodes @ block.between_nodes.weight[..., 0].T + block.between_nodes.bias  # pyright: ignore
    told = assign @ (block.between_states.weight[..., 0] @ spoken.clamp(min=0)).T  # cells x states
    branch = told @ block.extend.weight.flatten(1).T
    normal = (branch - branch.mean()) / (branch.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(block(x)[0].flatten(1).T, cells + normal, rtol=1e-4, atol=1e-5)


def test_the_pixel_term_is_the_distance_of_what_the_graphs_say() -> None:
    torch.manual_seed(0)
    student, teacher, method = fake.taps(2, 1), fake.taps(2, 2), Loss(Config(), fake.pair())
    for blocks in (method.student_graph, method.teacher_graph):
        for block in blocks:
            nn.init.ones_(block.norm.weight)  # pyright: ignore
    expected = 0.0
    pairs = zip(method.student_graph, student.pyramid, method.teacher_graph, teacher.pyramid, strict=True)
    for mine, s, its, t in pairs:
        gap = mine(s).double() - its(t).double()
        expected += sum(1e-3 * gap[i].square().sum().sqrt().item() for i in range(2)) / 2
    assert fake.run(method, student, teacher, fake.batch(2))["feat"].item() == pytest.approx(expected, rel=1e-5)
    assert [block.assign.out_channels for block in method.student_graph] == [2, 2, 8]


def test_images_without_objects_have_pixels_alone() -> None:
    student, method = fake.require_grad(fake.taps(2, 1)), Loss(Config(), fake.pair())
    terms = fake.run(method, student, fake.taps(2, 2), fake.batch(2, 0))
    assert terms["feat"] > 0
    assert (terms["instance"], terms["foreground"]) == (0, 0)


def test_weights_are_the_authors_by_family_and_zeros_are_left_out() -> None:
    two = fake.pair(student=replace(fake.SHAPES, family="two_stage"))
    assert (Loss(Config(), fake.pair()).instance, Loss(Config(), two).instance) == (5e-3, 4e-3)
    method = Loss(Config(pixel=0.0, foreground=0.0, instance=1.0), two)
    assert set(fake.run(method, fake.taps(1, 1), fake.taps(1, 2), fake.batch(1))) == {"instance"}


@pytest.mark.parametrize("settings", [{"pixel": -1.0}, {"instance": -1.0}, {"foreground": -1.0}, {"width": 0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)  # pyright: ignore[reportArgumentType]
