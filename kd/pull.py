"""How hard a term pulls at the student beside the task. A term's value tells little of it: one that is a hundredth of
the task loss may move the maps as much as the task does."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data_sharding.batch import Taps


def pulls(losses: Mapping[str, Tensor], taps: Taps) -> dict[str, tuple[str, float]]:
    """By the name of each `kd/` term that has a gradient: the tap at which it was measured, and the 2-norm of the
    term's gradient there over that of the task's. That tap is the pyramid; `c5` for a term that does not reach it.

    `taps` are those that the losses were made of, with their graph, which is kept.
    """
    terms = {name: value for name, value in losses.items() if name.startswith("kd/") and value.requires_grad}
    task = torch.stack([value for name, value in losses.items() if name.startswith("task/")]).sum()
    found: dict[str, tuple[str, float]] = {}
    for name, maps in (("pyramid", taps.pyramid), ("c5", () if taps.c5 is None else (taps.c5,))):
        whole = _norm(task, maps)
        rest = {term: _norm(terms[term], maps) for term in terms if term not in found}
        found |= {term: (name, norm / whole) for term, norm in rest.items() if norm > 0 and whole > 0}
    return found


def _norm(value: Tensor, maps: Sequence[Tensor]) -> float:
    """Of the gradient of `value` with respect to the maps; 0 where it does not reach them."""
    there = [x for x in maps if x.requires_grad]
    if not there:
        return 0.0
    gradients = torch.autograd.grad(value, there, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
