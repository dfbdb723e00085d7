"""A term's gradient at the student's maps, beside the task's, whatever the terms' values are."""

import pytest
import torch

from data_sharding.batch import Taps
from kd.pull import pulls


def test_a_pull_is_a_ratio_of_gradients_at_the_deepest_common_tap() -> None:
    c5 = torch.ones(1, 2, 2, 2, requires_grad=True)
    pyramid = (2 * c5, 3 * c5[:, :1])
    flat = torch.cat([level.flatten() for level in pyramid])
    losses = {
        "task/cls": 2 * flat.sum(),
        "task/box": flat.sum() + 1000,
        "kd/near/feat": 0.6 * flat.sum() - 7,
        "kd/far/feat": (13 * c5[:, :1]).sum(),
        "kd/gone/feat": torch.tensor(5.0),
        "kd/zero/feat": 0 * flat.sum(),
        "assistant/near": torch.tensor(1.0),
    }
    found = pulls(losses, Taps(c5, pyramid))
    assert found.keys() == {"kd/near/feat", "kd/far/feat"}
    assert found["kd/near/feat"] == ("pyramid", pytest.approx(0.2))
    # A channel of c5 stands in both levels, the other in one: the task's gradient there is 3 x (2 + 3) and 3 x 2.
    assert found["kd/far/feat"] == ("c5", pytest.approx(13 / (15**2 + 6**2) ** 0.5))


def test_without_a_task_or_a_c5_nothing_is_told() -> None:
    level = torch.ones(1, 1, 2, 2, requires_grad=True)
    assert pulls({"task/cls": 0 * level.sum(), "kd/a/feat": level.sum()}, Taps(None, (level,))) == {}
