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
    frequency = sine_frequencies(channels).to(device)

    def waves(count: int) -> Tensor:
        centres = (torch.arange(count, device=device) + 0.5) * cell
        angles = centres[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = waves(height)[:, None], waves(width)[None]
    code = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2)
    return code.permute(2, 0, 1)[None]


def place_code(places: Tensor, channels: int) -> Tensor:
    """(..., 2) x and y in cells -> (..., channels) float32: the same code of any place."""
    angles = places.float().flip(-1)[..., None] * sine_frequencies(channels).to(places.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def sine_frequencies(channels: int) -> torch.Tensor:
    """(channels // 4,) float32: radians per cell of the code's waves, fastest first."""
    quarter = channels // 4
    return 10000.0 ** -(torch.arange(quarter) / quarter)


@torch.no_grad()
def local_projection_(weight: torch.Tensor, heads: int, rate: int, sigma: float) -> None:
    """Fill the projection (heads * head width, channels) of a sine code so that queries and keys that both use it
    attend to their own place: the scaled scores fall off like -(distance / sigma)^2 / 2, distance in cells of `rate`.

    Each head reads a quarter of its width of waves, spread from the fastest that cells of `rate` still resolve to
    slow ones, which tell the fast ones' periods apart.
    """
    width, channels = weight.shape[0] // heads, weight.shape[1]
    if width < 4:
        raise ValueError(
            f"a local start needs heads of at least 4 channels, got {width}; take fewer heads or none (null)"
        )
    quarter, waves, frequency = channels // 4, width // 4, sine_frequencies(channels)
    first = int((frequency * rate > 2).sum())
    last = max(first, 3 * quarter // 4 - 1)
    spread = torch.linspace(first, last, waves + 1)[:waves] if waves > 1 else torch.tensor([(first + last) / 2])
    chosen = spread.round().long().clamp(max=quarter - 1)
    gain = (width**0.5 / ((rate * sigma) ** 2 * frequency[chosen].square().sum())) ** 0.5
    weight.zero_()
    for head in range(heads):
        for place, wave in enumerate(chosen.tolist()):
            for part in range(4):  # sine and cosine of the row, then of the column
                weight[head * width + 4 * place + part, part * quarter + wave] = gain
