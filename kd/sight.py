"""What a teacher tells apart. A map that is the same for every image has nothing to teach, however large its numbers:
where small objects are all found on fine levels, a detector's deepest stage can end up that way."""

from collections.abc import Sequence

from torch import Tensor

from data_sharding.batch import Taps


def told_apart(looks: Sequence[Taps], strides: Sequence[int]) -> dict[str, float]:
    """By the name of each map (`C5`, `P3`, ...) the share of its energy that differs from image to image: 1 where maps
    have nothing in common, 0 where all are the same.

    Images are compared within a look, cell by cell, so a look of one image says nothing; with no other there is no
    share. `strides` are the pyramid's, in pixels.
    """
    maps: dict[str, list[Tensor]] = {}
    for taps in looks:
        named = {} if taps.c5 is None else {"C5": taps.c5}
        named |= {f"P{s.bit_length() - 1}": level for s, level in zip(strides, taps.pyramid, strict=True)}
        for name, x in named.items():
            if len(x) > 1:
                maps.setdefault(name, []).append(x.detach().float())
    return {name: _share(found) for name, found in maps.items()}


def _share(looks: Sequence[Tensor]) -> float:
    """Of (B, C, H, W) maps of several looks: the variance over images, in each cell and channel, over the energy."""
    differs = sum((x.var(dim=0) * len(x)).sum().item() for x in looks)
    whole = sum(x.square().sum().item() for x in looks)
    return differs / whole if whole else 0.0
