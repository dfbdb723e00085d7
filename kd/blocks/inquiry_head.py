"""Where small objects are: a head that learns to say so on a pyramid level (the query head of QueryDet, CVPR 2022,
arXiv:2103.09136; HMKD's Inquiry Head), and which objects its hot cells belong to.

Shape letters: B images, N boxes of the fullest image, C channels, H x W cells of a level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from data_sharding.batch import Batch


@dataclass(frozen=True, kw_only=True)
class InquiryConfig:
    """The Inquiry Head; its settings are QueryDet's."""

    width: int = 256
    depth: int = 4
    radius: float = 1.0
    """Cells nearer to a small object's centre than so many square roots of its area are wanted."""
    threshold: float = 0.12
    """Cells of a larger probability are candidates."""
    fallback: bool = True
    """Ask about all small objects of an image in which no candidate is near one."""
    alpha: float = 0.25
    gamma: float = 1.2
    """Of the focal loss; 1.3 on VisDrone."""
    weight: float = 10.0
    student: float = 0.0
    """Weight of the loss of a second head on the student's own levels."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0 or self.radius <= 0 or not 0 <= self.threshold < 1:
            raise ValueError(
                "inquiry.width must be >= 1, depth >= 0, radius > 0 and threshold in [0, 1), got "
                f"{self.width}, {self.depth}, {self.radius} and {self.threshold}"
            )
        if not 0 <= self.alpha <= 1 or min(self.gamma, self.weight, self.student) < 0:
            raise ValueError(
                "inquiry.alpha must be in [0, 1], gamma, weight and student >= 0, got "
                f"{self.alpha}, {self.gamma}, {self.weight} and {self.student}"
            )


class InquiryHead(nn.Module):
    """3x3 convolutions with ReLUs and a last one to one channel, the same for every level."""

    def __init__(self, channels: int, config: InquiryConfig) -> None:
        super().__init__()
        width, depth = config.width, config.depth
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Conv2d(width if i else channels, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width if depth else channels, 1, 3, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, level: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W) logits."""
        return self.layers(level)[:, 0]


@dataclass(frozen=True)
class SmallObjects:
    """The labelled objects of a batch, padded to the image with most of them."""

    boxes: Tensor
    """(B, N, 4) canvas pixels."""
    small: Tensor
    """(B, N) bool; padding is not."""
    ignore: Tensor
    """(B, R, 4) ignored regions; the padding's have no area."""
    sizes: Tensor
    """(B, 2) valid height and width."""
    radius: float
    """How far from a small object's centre cells belong to it, in square roots of its area."""

    def near(self, shape: tuple[int, int], stride: int) -> Tensor:
        """(B, N, H, W) bool: the cell's centre is near a small object, or the cell holds the object's centre (else an
        object smaller than the cells would have none)."""
        rows, columns = _centres(shape, stride, self.boxes.device)
        middle = (self.boxes[..., :2] + self.boxes[..., 2:]) / 2
        across = (columns - middle[..., :1])[:, :, None]
        down = (rows - middle[..., 1:])[:, :, :, None]
        area = (self.boxes[..., 2:] - self.boxes[..., :2]).prod(-1)[..., None, None]
        close = across.square() + down.square() < self.radius**2 * area
        return (close | _holds(middle, shape, stride)) & self.small[..., None, None]

    def counted(self, shape: tuple[int, int], stride: int) -> Tensor:
        """(B, H, W) bool: the cell's centre is on the image and in no ignored region."""
        rows, columns = _centres(shape, stride, self.boxes.device)
        on_image = (rows < self.sizes[:, :1])[:, :, None] & (columns < self.sizes[:, 1:])[:, None]
        x1, y1, x2, y2 = (self.ignore[..., i, None] for i in range(4))
        hidden = ((rows >= y1) & (rows < y2))[..., None] & ((columns >= x1) & (columns < x2))[:, :, None]
        return on_image & ~hidden.any(dim=1)

    def focal(self, logits: Tensor, stride: int, config: InquiryConfig) -> Tensor:
        """(B, H, W) logits -> (B,): each image's mean focal loss over cells; left-out cells count as 0."""
        shape = (logits.shape[1], logits.shape[2])
        wanted = self.near(shape, stride).any(dim=1)
        weigh = {"alpha": config.alpha, "gamma": config.gamma}
        loss = sigmoid_focal_loss(logits.float(), wanted.float(), reduction="none", **weigh)
        return (loss * (wanted | self.counted(shape, stride))).mean(dim=(1, 2))

    def candidates(
        self, logits: Tensor, stride: int, config: InquiryConfig, most: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which small objects (B, N) have a cell near them whose probability exceeds the threshold, with `fallback` all
        of them in an image where none has; and the hottest such cells near no small object: centres (B, P, 2) and
        whether they are any (B, P), P at most `most`."""
        shape = (logits.shape[1], logits.shape[2])
        near, hot = self.near(shape, stride), logits.float().sigmoid() > config.threshold
        found = (near & hot[:, None]).flatten(2).any(dim=2)
        if config.fallback:
            found = torch.where(found.any(dim=1, keepdim=True), found, self.small)
        lonely = (hot & ~near.any(dim=1) & self.counted(shape, stride)).flatten(1)
        score = torch.where(lonely, logits.float().flatten(1), -torch.inf)
        index = score.topk(min(most, score.shape[1])).indices
        rows, columns = _centres(shape, stride, logits.device)
        centres = torch.stack([columns[index % shape[1]], rows[index // shape[1]]], dim=-1)
        return found, (centres, lonely.gather(1, index))


def small_objects(batch: Batch, side: float, original: bool, radius: float) -> SmallObjects:
    """The objects whose area is below `side` squared, in pixels of the `original` image (of the canvas where its scale
    is unknown) or of the canvas."""
    boxes = pad_sequence(list(batch.boxes), batch_first=True)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    if original and batch.scales is not None:
        area = area / batch.scales.prod(dim=1)[:, None]
    there = pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in batch.labels], batch_first=True)
    ignore = pad_sequence(list(batch.ignore), batch_first=True)
    return SmallObjects(boxes, there & (area < side**2), ignore, batch.geometry.sizes, radius)


def _centres(shape: tuple[int, int], stride: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(H,) and (W,): y and x of the cells' centres in pixels."""
    rows, columns = (((torch.arange(n, device=device) + 0.5) * stride) for n in shape)
    return rows, columns


def _holds(middle: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """(B, N, 2) points -> (B, N, H, W) bool: the cell that holds the point."""
    x, y = (middle / stride).floor().long().unbind(-1)
    rows, columns = (torch.arange(n, device=middle.device) for n in shape)
    down, across = rows == y.clamp(0, shape[0] - 1)[..., None], columns == x.clamp(0, shape[1] - 1)[..., None]
    return down[..., None] & across[:, :, None]
