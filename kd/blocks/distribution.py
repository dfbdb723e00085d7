"""Boxes whose four sides are distributions over whole distances 0..n instead of numbers (Li et al., "Generalized focal
loss", NeurIPS 2020, arXiv:2006.04388, section 3.2).

Shape letters: P places, E = n + 1 bins of one side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DFL = 0.25
"""Weight of the distribution focal loss beside the box loss (GFL, section 4)."""


def check_bins(bins: int | None) -> None:
    """ValueError where a detector's `bins` can hold no distance."""
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be at least 2 (16 in the paper), or null for plain numbers, got {bins}")


def last_layer(width: int, answers: int, bins: int | None, plain: nn.Conv2d) -> nn.Conv2d:
    """The convolution that answers with boxes: `plain`, or one with a distribution for each of 4 sides of `answers`
    boxes, at first almost even, so that all distances can be reached."""
    if bins is None:
        return plain
    layer = nn.Conv2d(width, answers * 4 * (bins + 1), 3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def sides(found: Tensor) -> tuple[Tensor, Tensor | None]:
    """(..., 4) numbers, or (..., 4 * E) logits of their distributions -> (..., 4) numbers, means where there are
    distributions, and those as (..., 4, E) logits, or None."""
    if found.shape[-1] == 4:
        return found, None
    edges = found.unflatten(-1, (4, -1))
    bins = torch.arange(edges.shape[-1], device=edges.device, dtype=edges.dtype)
    return (edges.softmax(-1) * bins).sum(-1), edges


def focal(edges: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (GFL, eq. 6): (P, 4, E) logits and (P, 4) true distances -> (P, 4) cross-entropy to the
    two bins beside each distance, by nearness. Distances outside 0..n count as the nearest that can be said."""
    wanted = distances.clamp(0, edges.shape[-1] - 1)
    left = wanted.floor().clamp(max=edges.shape[-1] - 2).long()
    log = F.log_softmax(edges, dim=-1)
    beside = torch.stack([left, left + 1], dim=-1)
    near = torch.stack([left + 1 - wanted, wanted - left], dim=-1)
    return -(log.gather(-1, beside) * near).sum(-1)
