"""Response distillation: what one head's outputs ask of another's. Ambiguity S18 of the reference.

Shape letters: P positives.
"""

import torch.nn.functional as F
from torch import Tensor


def soft_classes(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy to the target's probabilities, number by number, minus the target's own entropy: that moves
    no gradient and makes the term 0 where both agree."""
    soft = target.detach().sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(target.detach(), soft, reduction="none")


def box_error(student: Tensor, target: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(P, 4) of student, target and ground truth in one coding -> the sum of the box term.

    `bounded` is Chen et al.'s L_b (NeurIPS 2017, eq. 4) with margin 0: the student's squared error to the ground truth,
    where it exceeds the target's. `smooth_l1` (beta 1) draws the student to the target.
    """
    target = target.detach()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, target, reduction="sum")
    if kind != "bounded":
        raise ValueError(f"box_loss must be 'bounded' or 'smooth_l1', got {kind!r}")
    error = (student - truth).square().sum(-1)
    return (error * (error.detach() > (target - truth).square().sum(-1))).sum()
