"""What a head says of each of its places, flat, beside what the labels say of them: what response methods compare.

Shape letters: B images, L places of one image's levels, N places of all images, K classes, C codes of one place, M
boxes of all images, E bins of an edge.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of a dense head, of its locations or anchors, or of a second stage, of its regions; those of all
    images one after the other, in float32."""

    image: Tensor
    """(N,) int64: whose place it is."""
    logits: Tensor
    """(N, K) before the sigmoid; of regions (N, K + 1) before the softmax, background first."""
    codes: Tensor
    """(N, C, 4): the box in the detector's own coding; of regions one for each column of `logits`, else one."""
    places: Tensor
    """(N, 4): anchors, regions, or squares of 8 strides around locations, in canvas pixels."""
    truth: Tensor
    """(N,) int64: the box, among those of all images, that the place answers for, or below 0."""
    label: Tensor
    """(N,) int64: that box's class, or -1."""
    allowed: Tensor
    """(N,) bool: it lies on the image."""
    share: Tensor
    """What a sum over places is multiplied by: 1 / the positives of the global batch, or 1 / the regions asked for."""
    regions: bool
    """Whether these are a second stage's."""
    decode: Callable[[Tensor], Tensor]
    """Codes (N, 4), one of each place -> boxes (N, 4) in canvas pixels."""
    lengths: tuple[int, ...] = ()
    """How many places of one image each level has; empty of regions."""
    edges: Tensor | None = None
    """(N, 4, E) before the softmax, where boxes are coded as distributions."""

    @property
    def positive(self) -> Tensor:
        """(N,) bool: the place answers for a box."""
        return self.truth >= 0

    @property
    def scores(self) -> Tensor:
        """(N, K): probabilities of the classes."""
        return self.logits.softmax(-1)[:, 1:] if self.regions else self.logits.sigmoid()

    def code_of(self, label: Tensor) -> Tensor:
        """(N,) classes, or -1 -> (N, 4): the code of that class's box."""
        if not self.regions:
            return self.codes[:, 0]
        return self.codes[torch.arange(len(label), device=label.device), label + 1]


def of_all_images(
    maps: tuple[Tensor, ...], places: Tensor, matched: Tensor, allowed: Tensor, labels: Tensor, share: Tensor
) -> dict[str, Tensor]:
    """The parts of a dense head's `Answers` that do not depend on its coding.

    `maps` are the class logits (B, L, K) and codes (B, L, 4), `places` (L, 4), `matched` (B, L) an index into the boxes
    of all images or below 0, `allowed` (B, L), `labels` (M,).
    """
    logits, codes = maps
    images, count = matched.shape
    return {
        "image": torch.arange(images, device=matched.device).repeat_interleave(count),
        "logits": logits.flatten(0, 1),
        "codes": codes.flatten(0, 1)[:, None],
        "places": places.repeat(images, 1),
        "truth": matched.flatten(),
        "label": label_of(matched.flatten(), labels),
        "allowed": allowed.flatten(),
        "share": share,
    }


def label_of(truth: Tensor, labels: Tensor) -> Tensor:
    """(N,) indices into `labels` (M,), or below 0 -> (N,): the label, or -1."""
    known = torch.cat([labels, labels.new_full((1,), -1)])  # -1 reads the last
    return known[truth.clamp(min=-1)]
