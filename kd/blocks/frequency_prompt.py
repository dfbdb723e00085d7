"""Which details of a map matter (FreeKD's frequency prompts): learned tokens that point at places in wavelet bands.

Shape letters: B images, C channels, T tokens, h x w cells of one halving.
"""

import torch
from torch import Tensor, nn


class FrequencyPrompt(nn.Module):
    """A set of tokens for each halving; a token's mask is the sigmoid of its product with a place's details, the three
    added up. New tokens are near 0 and their masks near 1/2."""

    def __init__(self, channels: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(torch.randn(tokens, channels) * 0.01 for _ in range(depth))

    def forward(self, *details: Tensor) -> tuple[Tensor, ...]:
        """(B, C, 3, h, w) per halving -> (B, T, h, w) in (0, 1) per halving."""
        pairs = zip(self.tokens, details, strict=True)
        return tuple(torch.einsum("tc,bchw->bthw", tokens, x.sum(dim=2)).sigmoid() for tokens, x in pairs)


def overlap(masks: Tensor) -> Tensor:
    """(B, T, h, w) -> (B,): the mean dice coefficient of two different tokens' masks, 0 for a single token."""
    flat, count = masks.float().flatten(2), masks.shape[1]
    squares = flat.square().sum(dim=2)
    dice = 2 * flat @ flat.transpose(1, 2) / (squares[:, :, None] + squares[:, None] + 1e-12)
    others = ~torch.eye(count, dtype=torch.bool, device=masks.device)
    return (dice * others).sum(dim=(1, 2)) / max(1, count * (count - 1))
