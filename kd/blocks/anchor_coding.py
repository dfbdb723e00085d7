"""Boxes coded relative to anchors: torchvision's deltas, or distances of their sides from the anchor's centre.

Shape letters: P places, L anchors.
"""

from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from kd.blocks import points as pts
from kd.blocks.anchors import Anchors


class AnchorCoding:
    """`distances`: to left, top, right, bottom in strides of the anchor's level, which a distribution over bins can
    say (LD, section 4); else torchvision's deltas, whose range has no end. `index` (P,) says which anchors."""

    def __init__(self, distances: bool) -> None:
        self._distances = distances
        self._deltas = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))

    def encode(self, boxes: Tensor, anchors: Anchors, index: Tensor) -> Tensor:
        """(P, 4) boxes -> (P, 4) codes."""
        if self._distances:
            return pts.encode(*_places(anchors, index), boxes)
        return self._deltas.encode_single(boxes, anchors.boxes[index])

    def decode(self, codes: Tensor, anchors: Anchors, index: Tensor) -> Tensor:
        """(P, 4) codes -> (P, 4) boxes."""
        if self._distances:
            return pts.decode(*_places(anchors, index), codes)
        return self._deltas.decode_single(codes, anchors.boxes[index])


def _places(anchors: Anchors, index: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 2) centres and (P,) strides."""
    boxes = anchors.boxes[index]
    return (boxes[:, :2] + boxes[:, 2:]) / 2, anchors.stride[index]
