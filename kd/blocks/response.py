"""Response distillation: what one head's outputs ask of another's. Ambiguity S18 of the reference.

Shape letters: P positives, N regions, K classes.
"""

import torch.nn.functional as F
from torch import Tensor

from kd.blocks.answers import Answers
from kd.blocks.divergence import softened_kl


def soft_classes(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy to the target's probabilities, number by number, minus the target's own entropy: that moves
    no gradient and makes the term 0 where both agree."""
    soft = target.detach().sigmoid()
    cross = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(target.detach(), soft, reduction="none")


def soften(student: Answers, teacher: Answers, temperature: float) -> Tensor:
    """(N,): T^2 times the divergence of the student's softened classes from the teacher's, at each place; of a dense
    head, summed over its classes."""
    if student.regions:
        return softened_kl(student.logits, teacher.logits.detach(), temperature, dim=1)
    softened = soft_classes(student.logits / temperature, teacher.logits / temperature)
    return temperature**2 * softened.sum(-1)


def normalised_classes(logits: Tensor, target: Tensor, temperature: float, regions: bool) -> Tensor:
    """(P, K) of a dense head, or (P, K + 1) of regions, and target logits (P, K) -> (P,): T^2 times the divergence from
    the target's softened classes. A dense head's and its target's probabilities are each divided by their sum; to the
    target of a region, which is an object, the background is impossible (CLSD)."""
    if regions:
        log_s, log_t = (logits / temperature).log_softmax(-1)[:, 1:], (target.detach() / temperature).log_softmax(-1)
    else:
        log_s, log_t = (F.logsigmoid(x / temperature) for x in (logits, target.detach()))
        log_s, log_t = (x - x.logsumexp(dim=1, keepdim=True) for x in (log_s, log_t))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


BACKGROUND_WEIGHT = 1.5
"""How much more than objects the background counts among regions (Chen et al., NeurIPS 2017)."""


def soft_regions(logits: Tensor, target: Tensor) -> Tensor:
    """(N, K + 1) of student and target, background first -> (N,) cross-entropy to the target's distribution minus its
    entropy, times the class weight that the target expects.

    Departure: Chen et al. weigh each class's summand, by which a student that agrees is still moved.
    """
    log_soft = F.log_softmax(target.detach(), dim=-1)
    soft = log_soft.exp()
    weight = 1 + (BACKGROUND_WEIGHT - 1) * soft[:, 0]
    return weight * (soft * (log_soft - F.log_softmax(logits, dim=-1))).sum(-1)


def box_error(student: Tensor, target: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(P, 4) of student, target and ground truth in one coding -> the sum of the box term.

    `bounded` is Chen et al.'s L_b (NeurIPS 2017) with margin 0: the student's squared error to the ground truth,
    where it exceeds the target's. `smooth_l1` (beta 1) draws the student to the target.
    """
    target = target.detach()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, target, reduction="sum")
    if kind != "bounded":
        raise ValueError(f"box_loss must be 'bounded' or 'smooth_l1', got {kind!r}")
    error = (student - truth).square().sum(-1)
    return (error * (error.detach() > (target - truth).square().sum(-1))).sum()
