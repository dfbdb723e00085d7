import pytest
import torch
from torch import Tensor

from data_sharding.codecs.choice import candidates, chosen, is_open, measured


def noise(seed: int = 0) -> Tensor:
    return torch.randn(16, 12, 12, generator=torch.Generator().manual_seed(seed))


def loud() -> Tensor:
    """Fifteen channels of size 1 and one of 30."""
    x = noise()
    x[0] += 30
    return x


def test_only_a_word_that_names_no_codec_leaves_a_choice() -> None:
    assert candidates("int8") == ("int8_channel", "int8_position")
    assert candidates("fp16") == ("fp16",)
    assert is_open(["fp16", "sparse"])
    assert not is_open(["fp16", "sparse_channel"])


def test_each_tap_gets_the_codec_that_errs_less_on_it() -> None:
    """A loud channel favours a scale per channel, positions of unequal size one per position."""
    loud_channels = loud()
    loud_positions = noise() * torch.logspace(-2, 1, 144).view(12, 12)
    asked = ("int8", "int8", "fp16")
    errors = measured(asked, ("c5", "p3", "p4"), [[(loud_channels, None), (loud_positions, None), (noise(), None)]])
    assert chosen(asked, errors) == ("int8_channel", "int8_position", "fp16")
    assert [len(one) for one in errors] == [2, 2, 0]
    assert errors[0]["int8_position"] > 3 * errors[0]["int8_channel"]


def test_what_lies_outside_of_the_mask_does_not_count() -> None:
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:4] = True
    inside = loud()
    both = torch.where(mask, inside, 1e3 * noise(1))
    (alone,), (found,) = (measured(["sparse"], ["p3"], [[(x, mask)]]) for x in (inside * mask, both))
    assert found == alone
    assert chosen(["sparse"], [found]) == ("sparse_channel",)


@pytest.mark.parametrize("asked", ["int8", "sparse"])
def test_equal_errors_and_no_foreground_take_the_first(asked: str) -> None:
    nothing = torch.zeros(12, 12, dtype=torch.bool)
    errors = measured([asked], ["p3"], [[(torch.zeros(4, 12, 12), nothing)]])
    assert chosen([asked], errors) == (candidates(asked)[0],)
