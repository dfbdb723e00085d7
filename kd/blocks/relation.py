"""How the objects of one image stand to each other in feature space.

Shape letters: M objects of all images, B images, n the most of one image, F numbers of one object.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_distances(features: Tensor, image: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """(M, F) features of objects of images (M,), ascending -> (B, n, n) float32 distances between an image's objects,
    each divided by their mean, and (B,) how many objects each image has. Places without an object hold 0."""
    counts = torch.bincount(image, minlength=images)
    most = int(counts.max()) if len(image) else 0
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
    padded = features.new_zeros((images, most, features.shape[1]), dtype=torch.float32)
    padded = padded.index_put((image, place), features.float())
    there = torch.arange(most, device=image.device) < counts[:, None]
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(most, dtype=torch.bool, device=image.device)
    apart = torch.cdist(padded, padded, compute_mode="donot_use_mm_for_euclid_dist") * pairs
    mean = apart.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    return apart / mean.clamp(min=1e-12)[:, None, None], counts


def relation_error(student: Tensor, teacher: Tensor, image: Tensor, images: int) -> Tensor:
    """(M, F) twice -> (B,): the mean over an image's pairs of the smooth L1 (beta 1) between relative distances; 0 for
    an image of fewer than three objects, of which two are always equally far apart."""
    mine, counts = relative_distances(student, image, images)
    its, _ = relative_distances(teacher.detach(), image, images)
    error = F.smooth_l1_loss(mine, its, reduction="none").sum(dim=(1, 2)) / (counts * (counts - 1)).clamp(min=1)
    return error * (counts >= 3)
