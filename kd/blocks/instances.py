"""What a level holds of each labelled object, and how the objects of an image relate (DRKD).

Shape letters: B images, C channels, H x W cells, M objects of all images, S cells per side of an object, D width.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


def object_maps(level: Tensor, boxes: Tensor, image: Tensor, stride: int, size: int) -> Tensor:
    """(B, C, H, W) and (M, 4) boxes in canvas pixels of images (M,) -> (M, C, S, S) float32, by RoIAlign."""
    # Places need float32, also where autocast made the maps bfloat16.
    regions = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    return roi_align(level.float(), regions.float(), size, 1 / stride, sampling_ratio=2, aligned=True)


class InstanceRelation(nn.Module):
    """x + W softmax_j(theta(x)_i phi(x)_j a_j) g(x)_j over the objects j of i's image, where a, a softmax over these,
    says how much each object matters to the rest. W starts at zero."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Linear(features, width) for _ in range(3))
        self.matter, self.out = nn.Linear(features, 1), nn.Linear(width, features)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """(M, D) objects of images (M,) -> same shape."""
        others = image[:, None] != image[None]
        theta, phi, g, matter = (part(x).float() for part in (self.theta, self.phi, self.g, self.matter))
        with torch.autocast(x.device.type, enabled=False):
            filtered = matter.T.expand_as(others).masked_fill(others, -torch.inf).softmax(dim=1)
            mixed = (theta @ phi.T * filtered).masked_fill(others, -torch.inf).softmax(dim=1) @ g
        return x + self.out(mixed)
