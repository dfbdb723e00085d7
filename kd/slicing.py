"""Sliced inference: a large image seen in overlapping tiles, so that small objects keep their pixels (SAHI, Akyon et
al., ICIP 2022, arXiv:2202.06934), and the tiles' detections joined to detections of the whole image.

SAHI joins two boxes by their IoU, or by their intersection over the smaller one (IOS), which knows nothing of seams: a
long object loses its parts, and neighbours in a crowd are joined. Here two boxes of one class from different tiles are
one object when they agree (IoU) *within what both tiles saw*: for two whole boxes that is their IoU, for a part and
the whole it is 1 as IOS is, and it is 1 too for two parts of an object that no tile holds. What a seam cut off and
nothing agreed with is dropped where another box covers it (IOS). Boxes of one tile are never joined: the detector's
own suppression has judged them.

Shape letters: N detections of all tiles, M and P of two tiles, G objects. Boxes are x1 y1 x2 y2 in pixels of the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_area, box_iou

from kd.detectors.base import Detections

_TOUCH = 2.0
"""A box whose side lies within so many pixels of a seam is taken for cut by it."""
_GROWN = 0.5
"""Tiles that only touch share nothing: they and their boxes are grown by so many pixels across the seam."""


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """How large images are sliced."""

    size: tuple[int, int]
    """(height, width) of a tile, in pixels of the original image. Each tile is then resized as an image of its own."""
    overlap: float = 0.2
    """Part of a tile that its neighbour sees too. Objects up to this size are whole in one tile at least."""
    whole: bool = True
    """Also look at the whole image, as without slices, for objects larger than a tile."""
    match: float = 0.5
    """IoU, within what both tiles saw, from which two boxes are one object; and the IOS that drops a cut part."""
    nms: float = 0.6
    """Boxes of one class that overlap more (IoU) are suppressed in the whole image."""
    detections: int = 500
    """Most detections per image."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be (height, width) in pixels, at least 1, got {list(self.size)}")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap must be in [0, 0.9], got {self.overlap}")
        for name in ("match", "nms"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.detections < 1:
            raise ValueError(f"detections must be at least 1, got {self.detections}")


class Tile(NamedTuple):
    """A part of an image, in whole pixels."""

    x1: int
    y1: int
    x2: int
    y2: int


def tiles_of(height: int, width: int, config: SliceConfig) -> list[Tile]:
    """Tiles that cover an image, row by row; all of one size unless the image is smaller. The last of a row or column
    is moved inwards to end at the border. After them the whole image, where that is asked for and is not one tile."""
    rows = _starts(height, config.size[0], config.overlap)
    columns = _starts(width, config.size[1], config.overlap)
    tiles = [Tile(x, y, min(x + config.size[1], width), min(y + config.size[0], height)) for y in rows for x in columns]
    return [*tiles, Tile(0, 0, width, height)] if config.whole and len(tiles) > 1 else tiles


def sliced(image: Tensor, look: Callable[[Sequence[Tensor]], Sequence[Detections]], config: SliceConfig) -> Detections:
    """Detections of a large image (3, H, W). `look` finds objects in images of any sizes, each in its own pixels."""
    tiles = tiles_of(image.shape[1], image.shape[2], config)
    return merge(look([image[:, t.y1 : t.y2, t.x1 : t.x2] for t in tiles]), tiles, config)


def merge(parts: Sequence[Detections], tiles: Sequence[Tile], config: SliceConfig) -> Detections:
    """Detections of each tile, in the tile's pixels -> detections of the image that the tiles cover, best first."""
    device = parts[0].boxes.device
    frames = torch.tensor(tiles, dtype=torch.float32, device=device)
    boxes = torch.cat([part.boxes + frame[:2].repeat(2) for part, frame in zip(parts, frames, strict=True)])
    scores, labels = torch.cat([part.scores for part in parts]), torch.cat([part.labels for part in parts])
    counts = torch.tensor([len(part.boxes) for part in parts], device=device)
    tile = torch.arange(len(parts), device=device).repeat_interleave(counts)
    cut = _cut(boxes, frames[tile], frames[:, 2:].amax(0))
    groups = _grouped(_links(boxes, labels, tile, frames, config.match), tile.tolist())
    found, cut, best = _joined(boxes, scores, cut, groups)
    keep = ~_covered(found, labels[best], cut, config.match)
    found, best = found[keep], best[keep]
    kept = batched_nms(found, scores[best], labels[best], config.nms)[: config.detections]
    return Detections(found[kept], scores[best[kept]], labels[best[kept]])


def _starts(length: int, size: int, overlap: float) -> list[int]:
    """The first pixels of tiles along one side."""
    if length <= size:
        return [0]
    step = max(1, size - round(size * overlap))
    return [*range(0, length - size, step), length - size]


def _cut(boxes: Tensor, frames: Tensor, end: Tensor) -> Tensor:
    """(N,) bool: a seam, and not the image's border, may have cut the box. `end` is the image's (width, height)."""
    first, last = boxes[:, :2] <= frames[:, :2] + _TOUCH, boxes[:, 2:] >= frames[:, 2:] - _TOUCH
    return ((first & (frames[:, :2] > 0)) | (last & (frames[:, 2:] < end))).any(1)


def _links(boxes: Tensor, labels: Tensor, tile: Tensor, frames: Tensor, match: float) -> list[tuple[int, int]]:
    """Pairs of detections from two tiles that agree best with each other, the surest first."""
    pairs, strengths = [], []
    members = [(tile == t).nonzero().squeeze(1) for t in range(len(frames))]
    corners = frames.tolist()
    for i in range(len(frames)):
        for j in range(i + 1, len(frames)):
            zone = _shared(corners[i], corners[j])
            if zone is None or not len(members[i]) or not len(members[j]):
                continue
            agreed = _agreement(boxes[members[i]], boxes[members[j]], *zone)
            agreed = agreed * (labels[members[i], None] == labels[members[j]])
            mutual = (agreed == agreed.amax(1, keepdim=True)) & (agreed == agreed.amax(0)) & (agreed >= match)
            a, b = mutual.nonzero().unbind(1)
            pairs.append(torch.stack([members[i][a], members[j][b]], 1))
            strengths.append(agreed[a, b])
    if not pairs:
        return []
    order = torch.cat(strengths).argsort(descending=True, stable=True)
    return [(a, b) for a, b in torch.cat(pairs)[order].tolist()]


def _shared(a: Sequence[float], b: Sequence[float]) -> tuple[Sequence[float], Sequence[float]] | None:
    """What two tiles both see, and by how much boxes are grown (x, y, x, y); None where they do not even touch."""
    zone = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
    flat = [zone[2] == zone[0], zone[3] == zone[1]]
    if zone[2] < zone[0] or zone[3] < zone[1] or all(flat):
        return None
    grown = [-_GROWN * flat[0], -_GROWN * flat[1], _GROWN * flat[0], _GROWN * flat[1]]
    return [z + g for z, g in zip(zone, grown, strict=True)], grown


def _agreement(a: Tensor, b: Tensor, zone: Sequence[float], grown: Sequence[float]) -> Tensor:
    """(M, 4) and (P, 4) boxes -> (M, P) IoU of what lies in `zone`; 0 where nothing does."""
    low, high = a.new_tensor(zone[:2]).repeat(2), a.new_tensor(zone[2:]).repeat(2)
    one, two = ((x + x.new_tensor(grown)).maximum(low).minimum(high) for x in (a, b))
    return box_iou(one, two).nan_to_num(0.0)


def _grouped(links: Sequence[tuple[int, int]], tile: Sequence[int]) -> list[list[int]]:
    """Detections that are one object, by links from sure to unsure; a tile sees an object once."""
    group = [[i] for i in range(len(tile))]
    for a, b in links:
        one, two = group[a], group[b]
        if one is not two and not {tile[i] for i in one} & {tile[i] for i in two}:
            one += two
            for i in two:
                group[i] = one
    return [members for i, members in enumerate(group) if members[0] == i]


def _joined(boxes: Tensor, scores: Tensor, cut: Tensor, groups: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(G, 4) boxes: the surest that no seam cut, else the hull of all parts; (G,) bool: a part with no fellow;
    (G,) the surest detection's index."""
    found, alone, best = [], [], []
    for members in groups:
        whole = [i for i in members if not cut[i]]
        surest = max(members, key=lambda i: float(scores[i]))
        hull = torch.cat([boxes[members, :2].amin(0), boxes[members, 2:].amax(0)])
        found.append(boxes[max(whole, key=lambda i: float(scores[i]))] if whole else hull)
        alone.append(not whole and len(members) == 1)
        best.append(surest)
    index = torch.tensor(best, dtype=torch.int64, device=boxes.device)
    stacked = torch.stack(found) if found else boxes
    return stacked, torch.tensor(alone, dtype=torch.bool, device=boxes.device), index


def _covered(boxes: Tensor, labels: Tensor, cut: Tensor, match: float) -> Tensor:
    """(G,) bool: a cut part that a larger box of its class covers."""
    parts = cut.nonzero().squeeze(1)
    if not len(parts):
        return torch.zeros_like(cut)
    area = box_area(boxes)
    low = boxes[parts, None, :2].maximum(boxes[None, :, :2])
    high = boxes[parts, None, 2:].minimum(boxes[None, :, 2:])
    over = (high - low).clamp(min=0).prod(2) / area[parts, None].clamp(min=1e-9)
    larger = (labels[parts, None] == labels) & (area > area[parts, None])
    covered = torch.zeros_like(cut)
    covered[parts] = ((over >= match) & larger).any(1)
    return covered
