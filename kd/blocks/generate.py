"""What makes the teacher's map from a part of the student's (Yang et al., ECCV 2022, "Masked generative distillation").

Shape letters: B images, C channels, H x W cells.
"""

from torch import Tensor, nn


class Generator(nn.Sequential):
    """`layers` 3x3 convolutions with ReLUs between them; none: the map itself."""

    def __init__(self, channels: int, layers: int = 2) -> None:
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        between: list[nn.Module] = [part for conv in convolutions[1:] for part in (nn.ReLU(), conv)]
        super().__init__(*convolutions[:1], *between)


def masked(x: Tensor, chances: Tensor, share: float) -> Tensor:
    """(B, C, H, W) with the cells zeroed whose chance (B, H, W) is below `share`."""
    return x * (chances >= share)[:, None].to(x.device)
