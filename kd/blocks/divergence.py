"""Distances between a student map and a teacher map of the same shape, in float32, and their shares of a mean.

Shape letters: B images, C channels, H x W cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def share_of_mean(values: Tensor, images: Tensor) -> Tensor:
    """This micro-batch's share of the mean of `values` (B, ...) over a global batch of `images` images: the shares
    of all ranks and micro-batches sum to the mean."""
    return values.sum() / (values[0].numel() * images.clamp(min=1))


def share_of_image_means(values: Tensor, image: Tensor, images: int, total: Tensor) -> Tensor:
    """(N,) values, each of an image (N,) of this micro-batch's `images` -> this micro-batch's share of the mean, over
    the `total` images of the global batch, of each image's own mean; that is 0 where an image has no value."""
    counts = torch.bincount(image, minlength=images)
    return (values / counts[image]).sum() / total.clamp(min=1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(s - t)^2, cell by cell."""
    return (student.float() - teacher.float()).square()


def softened_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """T^2 * KL(teacher || student) of softmax(x / T) along `dim`, which vanishes from the shape."""
    log_s = F.log_softmax(student.float() / temperature, dim)
    log_t = F.log_softmax(teacher.float() / temperature, dim)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim)


def plane_moments(student: Tensor, teacher: Tensor) -> Tensor:
    """Moments of two (B, C, H, W) maps over each image's plane: (5, B, C) float64, namely the means of s and t and
    the central sums of squares of s, of t and of s * t.

    Centring each plane in float32 before squaring keeps the digits that raw sums of squares lose when a channel's
    mean is far from zero; only the small result is float64.
    """
    s, t = student.float().flatten(2), teacher.float().flatten(2)
    s_mean, t_mean = s.mean(dim=2, keepdim=True), t.mean(dim=2, keepdim=True)
    s, t = s - s_mean, t - t_mean
    sums = (s.square().sum(dim=2), t.square().sum(dim=2), (s * t).sum(dim=2))
    return torch.stack([s_mean[..., 0], t_mean[..., 0], *sums]).double()


def standardised_error(s_square: Tensor, t_square: Tensor, product: Tensor, cells: Tensor | int) -> Tensor:
    """Half the mean squared difference of two standardised channels, which is 1 - Pearson's r, from their central
    sums over `cells` cells. A channel that is constant in both maps gives 0, in one of them 1/2."""
    s_variance, t_variance, covariance = s_square / cells, t_square / cells, product / cells
    # The floor keeps the gradient of a dead channel finite; it is a standard deviation of 1e-4.
    s_total, t_total = s_variance + 1e-8, t_variance + 1e-8
    return (s_variance / s_total + t_variance / t_total) / 2 - covariance / (s_total * t_total).sqrt()


def root(sums: Tensor) -> Tensor:
    """The square root of sums of squares, with gradient 0, not infinity, where they are 0."""
    positive = sums > 0
    return torch.where(positive, sums, 1).sqrt() * positive


def distance(student: Tensor, teacher: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """(B, ...) twice -> (B,): each image's root of the (weighted) sum of squared differences. A root over a whole batch
    has no shares; these have."""
    return root((squared_error(student, teacher) * weight).flatten(1).sum(dim=1))
