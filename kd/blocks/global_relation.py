"""How every cell of a level relates to the rest of it: the non-local block (FKD) and the graph unit (DRKD).

Both are products without a softmax, so their cost grows with the cells, not with their square. Both add to the map a
branch that starts at zero, by a normaliser over each image alone: with BatchNorm, as published, a micro-batch's result
would hang on its mates. Shape letters: B images, C channels, H x W cells, N nodes, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.blocks.norms import group_norm


class NonLocal(nn.Module):
    """x + norm(W theta(x) mean_p(phi(x)_p g(x)_p)) (Wang et al., CVPR 2018, arXiv:1711.07971, dot product): p runs over
    the cells left by a max-pooling of `rate` x `rate`."""

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        inner, self.rate = max(1, channels // 2), rate
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(inner, channels, 1), _silent(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape."""
        pooled = (F.max_pool2d(part(x), self.rate, ceil_mode=True) for part in (self.phi, self.g))
        phi, g, theta = (part.flatten(2).float() for part in (*pooled, self.theta(x)))
        with torch.autocast(x.device.type, enabled=False):
            mixed = g @ phi.transpose(1, 2) @ theta / phi.shape[2]
        return x + self.norm(self.out(mixed.unflatten(2, x.shape[2:])))


class GraphReasoning(nn.Module):
    """GloRe (Chen et al., CVPR 2019, arXiv:1811.12814): cells are gathered into nodes, nodes speak to each other, and
    each cell gets back what its nodes say."""

    def __init__(self, channels: int, nodes: int) -> None:
        super().__init__()
        self.state, self.assign = nn.Conv2d(channels, 2 * nodes, 1), nn.Conv2d(channels, nodes, 1)
        self.between_nodes, self.between_states = (
            nn.Conv1d(nodes, nodes, 1),
            nn.Conv1d(2 * nodes, 2 * nodes, 1, bias=False),
        )
        self.extend, self.norm = nn.Conv2d(2 * nodes, channels, 1, bias=False), _silent(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> same shape."""
        state, assign = self.state(x).flatten(2).float(), self.assign(x).flatten(2).float()
        with torch.autocast(x.device.type, enabled=False):
            nodes = state @ assign.transpose(1, 2) / state.shape[2]  # (B, 2 N, N)
            spoken = nodes + self.between_nodes(nodes.transpose(1, 2)).transpose(1, 2)
            told = self.between_states(spoken.relu()) @ assign
        return x + self.norm(self.extend(told.unflatten(2, x.shape[2:])))


def _silent(channels: int) -> nn.GroupNorm:
    """A normaliser whose output starts at zero."""
    norm = group_norm(channels)
    nn.init.zeros_(norm.weight)
    return norm
