"""Blanking out frequencies of a map (MKD, ACML 2024, eqs. 2-3).

Shape letters: B images, C channels, H x W cells.
"""

from typing import Literal

import torch
from torch import Tensor

Symmetry = Literal["symmetric", "literal"]


def frequency_mask(chances: Tensor, share: float, symmetry: Symmetry) -> Tensor:
    """(B, H, W) even numbers in [0, 1) -> (B, 1, H, W // 2 + 1) float32: what the frequencies of a real map, as `rfft2`
    orders them, are multiplied by.

    A frequency whose number is below `share` is blanked out. `symmetric`: a frequency and its mirror image, which are
    one wave, share the lower one's number, and the mean (DC) always stays. `literal`: each of the H x W has its own,
    and the imaginary part of the inverse is dropped: that is the mean of a wave's two masks, 0, 1/2 or 1 (ambiguity
    M2).
    """
    height, width = chances.shape[-2:]
    place = torch.arange(height * width, device=chances.device).view(height, width)
    mirror = place.flip(0, 1).roll((1, 1), (0, 1))  # -k modulo the grid
    if symmetry == "symmetric":
        kept = (chances.flatten(1)[:, torch.minimum(place, mirror)] >= share).float()
        kept[:, 0, 0] = 1
    else:
        own = (chances >= share).float()
        kept = (own + own.flatten(1)[:, mirror]) / 2
    return kept[:, None, :, : width // 2 + 1]


def filtered(x: Tensor, mask: Tensor) -> Tensor:
    """(B, C, H, W) with its frequencies multiplied by a mask of `frequency_mask` -> same shape, float32."""
    waves = torch.fft.rfft2(x.float(), norm="ortho") * mask.to(x.device)
    return torch.fft.irfft2(waves, s=x.shape[-2:], norm="ortho")
