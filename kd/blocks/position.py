"""A sine code of a cell's place."""

import torch
from torch import Tensor


def sine_code(height: int, width: int, channels: int, cell: int, device: torch.device) -> Tensor:
    """(1, channels, height, width) float32 in [-1, 1]: sines and cosines of the row and of the column of each
    cell's centre, a quarter of the channels each (DETR's code, arXiv:2005.12872).

    `cell` is the size of a cell in cells of the level's full grid, so that codes of a reduced grid and of the full
    grid speak of the same places. `channels` must be a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"a sine position code needs a width that is a multiple of 4, got {channels}")
    quarter = channels // 4
    frequency = 10000.0 ** -(torch.arange(quarter, device=device) / quarter)

    def waves(count: int) -> Tensor:
        centres = (torch.arange(count, device=device) + 0.5) * cell
        angles = centres[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = waves(height)[:, None], waves(width)[None]
    code = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
    return code.permute(2, 0, 1)[None]
