"""The valuable localisation region: places near objects that no assignment takes for them (Zheng et al., "Localization
distillation", CVPR 2022, arXiv:2102.12252, algorithm 1).

Shape letters: B images, L places of each image, n boxes of all images, J candidates of a box.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, distance_box_iou

CANDIDATES = 9
"""Places of each level, nearest to a box's centre, whose overlap decides what overlaps it well (ATSS)."""


@torch.no_grad()
def valuable(places: Tensor, lengths: Sequence[int], boxes: Tensor, image: Tensor, images: int, low: float) -> Tensor:
    """(L, 4) places of levels of `lengths`, the same in every image, (n, 4) boxes of images (n,) -> (B, L): the
    greatest IoU with a box of the image for which the place's DIoU is at least `low` times the box's threshold, but
    below it; 0 of the other places."""
    nowhere = places.new_zeros(images, len(places))
    if not len(boxes):
        return nowhere
    threshold = adaptive_threshold(places, lengths, boxes)[:, None]
    apart, overlap = distance_box_iou(boxes, places), box_iou(boxes, places)
    inside = (apart >= low * threshold) & (apart < threshold)
    return nowhere.scatter_reduce_(0, image[:, None].expand_as(inside), overlap * inside, "amax")


def adaptive_threshold(places: Tensor, lengths: Sequence[int], boxes: Tensor) -> Tensor:
    """(n,): mean plus standard deviation of the IoUs of each box's candidates (ATSS, Zhang et al., CVPR 2020,
    arXiv:1912.02424, algorithm 1)."""
    centres, middle = (places[:, :2] + places[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    candidates, start = [], 0
    for length in lengths:
        # With many boxes torch would go by their products, which loses digits where distances nearly tie.
        far = torch.cdist(middle, centres[start : start + length], compute_mode="donot_use_mm_for_euclid_dist")
        candidates.append(far.topk(min(CANDIDATES, length), largest=False).indices + start)
        start += length
    chosen = torch.cat(candidates, dim=1)
    overlap = box_iou(boxes, places).gather(1, chosen)
    return overlap.mean(dim=1) + overlap.std(dim=1)
