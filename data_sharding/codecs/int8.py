"""Taps as whole numbers in -127..127 times a scale: the largest absolute value of a channel, or of a position, / 127.

Absmax and no clipping: clipping the largest values leaves the mean error alone but multiplies that of losses that take
a softmax over positions (CWD). The scale is float16, rounded up, so that no value is cut and none errs by more than
half a scale. Which of the two errs less depends on the teacher (`codecs.choice`). Shape letters: C channels, P rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_sharding.codecs.base import CodecError, Encoded, Per, as_bytes, as_rows, require_finite

LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Dense, or of the foreground alone, where a channel's scale is that of its foreground."""

    name: str
    per: Per
    sparse: bool = False
    dtype: torch.dtype = torch.int8

    def encode(self, x: Tensor, mask: Tensor | None = None, *, level: str) -> Encoded:
        """Encode a (C, h, w) tap, of which a sparse codec keeps the positions of `mask`, (h, w) bool."""
        rows, bits = as_rows(x, level).float(), b""
        if self.sparse:
            if mask is None or mask.shape != x.shape[1:]:
                shape = None if mask is None else tuple(mask.shape)
                raise CodecError(f"tap {level!r}: codec {self.name} needs a mask {tuple(x.shape[1:])}, got {shape}")
            rows, bits = rows[mask.flatten().to(rows.device)], _packed(mask)
        require_finite(rows, level)
        scale = self._scale(rows, level)
        divisor = torch.where(scale > 0, scale, 1).float()
        stored = (rows / divisor).round().to(torch.int8)
        return Encoded(rows=len(rows), payload=as_bytes(stored), scale=bytes(as_bytes(scale)), mask=bits)

    def _scale(self, rows: Tensor, level: str) -> Tensor:
        """(1, C) or (P, 1) float16, the next number from absmax / 127 upwards."""
        dim = 0 if self.per == "channel" else 1
        # Without a position there is no largest value; a row of zeros changes none.
        largest = (rows if len(rows) or dim else rows.new_zeros(1, rows.shape[1])).abs().amax(dim, keepdim=True)
        exact = largest / LARGEST
        rounded = exact.half()
        # The bits of positive floats count upwards; the largest finite one is followed by infinity.
        scale = (rounded.view(torch.int16) + (rounded.float() < exact)).view(torch.float16)
        if not torch.isfinite(scale).all():
            limit = LARGEST * torch.finfo(torch.float16).max
            raise CodecError(
                f"tap {level!r}: {int((~torch.isfinite(scale)).sum())} of {scale.numel()} scales do not fit codec "
                f"{self.name} (largest value {float(largest.max()):.6g}, limit {limit:.6g}); store this tap with "
                "codec fp32"
            )
        return scale


def _packed(mask: Tensor) -> bytes:
    """(h, w) bool as bits, the first position in the lowest bit of the first byte."""
    return np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little").tobytes()
