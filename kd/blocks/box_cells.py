"""Which cells of a level each box of a padded list meets, as a dense mask: for attention over boxes, where every box
has a row. (`foreground.cover` is the sparse list of the same cells.)

Shape letters: B images, Q boxes of an image, H x W cells of a level.
"""

import torch
from torch import Tensor


def box_cells(boxes: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """(B, Q, 4) in canvas pixels -> (B, Q, H, W) bool: the cell shares area with the box or holds its corner, so that
    no box is too small to have one."""
    limit = torch.tensor([shape[1], shape[0]], device=boxes.device)
    first = (boxes[..., :2] / stride).floor().long().clamp(min=0).minimum(limit - 1)
    last = (boxes[..., 2:] / stride).ceil().long().minimum(limit).maximum(first + 1)
    rows, columns = (torch.arange(n, device=boxes.device) for n in shape)
    across = (columns >= first[..., :1]) & (columns < last[..., :1])
    down = (rows >= first[..., 1:]) & (rows < last[..., 1:])
    return down[..., None] & across[:, :, None]
