"""From a dense head's maps to flat rows, and from scored rows to detections.

Shape letters: B images, A answers per cell, C numbers of one answer, L answers of all cells and levels, K classes,
D detections of one image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image


def flat(maps: tuple[Tensor, ...], shapes: tuple[tuple[int, int], ...], channels: int) -> Tensor:
    """One (B, A * C, H, W) map per level -> (B, L, C) float32, answers of one cell beside each other.

    `shapes` are the (rows, columns) that the canvas asks for; ValueError for others.
    """
    found = tuple((m.shape[-2], m.shape[-1]) for m in maps)
    if found != shapes:
        raise ValueError(f"the head's maps are {found} cells, the canvas asks for {shapes}; was the pyramid aligned?")
    rows = [m.unflatten(1, (-1, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
    return torch.cat(rows, dim=1).float()


def one_hot(matched: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(B, L) indices into `labels` (M,), below 0 for none -> (B, L, K) float32: 1 at the label of each match."""
    labels = torch.cat([labels, labels.new_full((1,), num_classes)])  # -1 reads the last
    hot = torch.zeros(*matched.shape, num_classes + 1, device=labels.device)
    return hot.scatter_(2, labels[matched.clamp(min=-1)][..., None], 1.0)[..., :num_classes]


def best_of_levels(scores: Tensor, lengths: list[int], most: int, threshold: float) -> Tensor:
    """(L, K) scores -> indices into its flattened pairs: of each level of `lengths` answers the `most` best pairs
    that score above `threshold`."""
    kept, start, num_classes = [], 0, scores.shape[1]
    for length in lengths:
        best, index = scores[start : start + length].flatten().topk(min(most, length * num_classes))
        kept.append(index[best > threshold] + start * num_classes)
        start += length
    return torch.cat(kept)


def suppressed(
    boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int], overlap: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), scores (N,) and labels (N,) of one image of (height, width) -> the `most` best (D,) of them,
    clipped to the image, without those that have no area or overlap a better one of their label (IoU > `overlap`)."""
    boxes = clip_boxes_to_image(boxes, size)
    some = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[some], scores[some], labels[some]
    keep = batched_nms(boxes, scores, labels, overlap)[:most]
    return boxes[keep], scores[keep], labels[keep]


def keep_rows(layer: nn.Conv2d | nn.Linear, rows: Sequence[int]) -> None:
    """Let a last layer answer only with some of its outputs, in this order."""
    layer.weight = nn.Parameter(layer.weight.detach()[list(rows)], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[list(rows)], requires_grad=layer.bias.requires_grad)
    name = "out_channels" if isinstance(layer, nn.Conv2d) else "out_features"
    setattr(layer, name, len(rows))
