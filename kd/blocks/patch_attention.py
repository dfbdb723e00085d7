"""Self-attention inside patches of a level (TinyKD): how the cells of one neighbourhood relate.

Shape letters: B images, C channels, H x W cells, N patches of an image, S cells per side of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchAttention(nn.Module):
    """x + W_o softmax(q k / T) v within each S x S patch; W_o starts at zero, so the block starts as the identity."""

    def __init__(self, channels: int, size: int, temperature: float) -> None:
        super().__init__()
        self.size, self.temperature = size, temperature
        self.query, self.key, self.value, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        for conv in (self.query, self.key, self.value):
            nn.init.normal_(conv.weight, std=0.01)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape. Patches begin at the top left; those that overhang attend to real cells alone."""
        real = _cut(x.new_ones(1, 1, *x.shape[2:]), self.size)[..., 0] > 0  # (N, S * S)
        real = real.repeat(len(x), 1)[:, None]
        q, k, v = (_cut(part(x), self.size).float() for part in (self.query, self.key, self.value))
        # Scores / 0.05 are large numbers close together, which half precision would merge.
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real, scale=1 / self.temperature)
        return x + self.out(_join(mixed, x, self.size))


def _cut(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B * N, S * S, C), padded with zeros at the bottom and on the right."""
    padded = F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
    patches = padded.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, S, columns, S)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def _join(patches: Tensor, like: Tensor, size: int) -> Tensor:
    """The inverse of `_cut`, for a map of the shape of `like`."""
    rows, columns = (-(-side // size) for side in like.shape[2:])
    apart = patches.view(len(like), rows, columns, size, size, patches.shape[-1]).permute(0, 5, 1, 3, 2, 4)
    return apart.flatten(4, 5).flatten(2, 3)[:, :, : like.shape[2], : like.shape[3]]
