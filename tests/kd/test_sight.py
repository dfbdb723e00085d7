"""What a teacher tells apart is measured whatever its maps' mean and size."""

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Taps
from kd.sight import told_apart


def maps(mean: float, spread: float, images: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    return mean + spread * torch.randn(images, 4, 8, 8, generator=generator)


def test_a_map_is_as_blind_as_its_mean_is_large() -> None:
    looks = [
        Taps(maps(0.0, 5.0), (maps(3.0, 1.0), maps(10.0, 0.0))),
        Taps(maps(0.0, 5.0, 7), (maps(3.0, 1.0, 7), maps(10.0, 0.0, 7))),
    ]
    shares = told_apart(looks, (8, 16))
    assert list(shares) == ["C5", "P3", "P4"]
    assert shares["C5"] == pytest.approx(1.0, abs=0.02)
    assert shares["P3"] == pytest.approx(0.1, abs=0.01), "a variance of 1 beside a mean of 3"
    assert shares["P4"] == pytest.approx(0.0, abs=1e-6)


def test_one_image_tells_nothing_apart_and_empty_maps_nothing() -> None:
    assert told_apart([Taps(None, (maps(1.0, 1.0, 1),))], (8,)) == {}
    assert told_apart([Taps(None, (torch.zeros(2, 1, 1, 1),))], (8,)) == {"P3": 0.0}
