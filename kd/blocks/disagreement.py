"""Where two heads disagree most: the general instances of GID (Dai et al., CVPR 2021, arXiv:2103.02340, section 3.1).

Shape letters: B images, N places of all images, K classes, n instances of one image, M of all images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, nms

from data_sharding.batch import Geometry
from kd.blocks.answers import Answers

CANDIDATES = 3000
"""Places of an image that non-maximum suppression looks at, as the authors' code has it."""


@dataclass(frozen=True)
class Instances:
    """Boxes that one of two heads sees and the other does not, or sees otherwise."""

    boxes: tuple[Tensor, ...]
    """Per image (n, 4) in canvas pixels, greatest disagreement first."""
    labels: tuple[Tensor, ...]
    """Per image (n,) int64: the surer head's class."""

    @property
    def image(self) -> Tensor:
        """(M,) int64: whose each instance is."""
        counts = torch.tensor([len(b) for b in self.boxes], device=self.boxes[0].device)
        return torch.repeat_interleave(counts, output_size=sum(len(b) for b in self.boxes))


@torch.no_grad()
def instances(student: Answers, teacher: Answers, geometry: Geometry, overlap: float, most: int) -> Instances:
    """Per image up to `most` boxes: a place's score is the greatest difference of the two heads' probabilities of one
    class, its box and label are those of the head that is surer of some class; of boxes that overlap (IoU > `overlap`)
    the greatest score stays. Boxes less than a pixel wide or high are none, nor are places where the heads agree."""
    mine, its = student.scores, teacher.scores
    gap = (its - mine).abs().amax(dim=1) * student.allowed
    surer = its.amax(dim=1) > mine.amax(dim=1)
    label = torch.where(surer[:, None], its, mine).argmax(dim=1)
    boxes = student.decode(torch.where(surer[:, None], teacher.code_of(label), student.code_of(label)))
    chosen = []
    for image, size in enumerate(geometry.sizes.tolist()):
        index = (student.image == image).nonzero()[:, 0]
        best = gap[index].topk(min(CANDIDATES, len(index))).indices
        index = index[best]
        inside = clip_boxes_to_image(boxes[index], size)
        some = (gap[index] > 0) & ((inside[:, 2:] - inside[:, :2]) >= 1).all(dim=1)
        inside, index = inside[some], index[some]
        keep = nms(inside, gap[index], overlap)[:most]
        chosen.append((inside[keep], label[index[keep]]))
    return Instances(tuple(b for b, _ in chosen), tuple(c for _, c in chosen))
