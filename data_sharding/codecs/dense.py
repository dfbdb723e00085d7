"""Every position of a tap as plain floating-point numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.codecs.base import CodecError, Encoded, Per, as_bytes, as_rows, require_finite


@dataclass(frozen=True, kw_only=True)
class Dense:
    """fp16 or fp32. What does not fit is an error, never an infinity."""

    name: str
    dtype: torch.dtype
    per: Per | None = None
    sparse: bool = False

    def encode(self, x: Tensor, mask: Tensor | None = None, *, level: str) -> Encoded:
        """Encode a (C, h, w) tap; `mask` is not asked."""
        rows = as_rows(x, level)
        stored = rows.to(self.dtype)
        if not torch.isfinite(stored).all():
            require_finite(rows, level)
            raise CodecError(self._too_large(rows, level))
        return Encoded(rows=len(stored), payload=as_bytes(stored))

    def _too_large(self, rows: Tensor, level: str) -> str:
        limit, largest = torch.finfo(self.dtype).max, float(rows.abs().max())
        count = int((rows.abs() > limit).sum())
        return (
            f"tap {level!r}: {count} of {rows.numel()} values do not fit codec {self.name} "
            f"(largest {largest:.6g}, limit {limit:.6g}); store this teacher with codec fp32"
        )
