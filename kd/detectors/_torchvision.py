"""torchvision's parameter names and ours differ in the prefix of backbone and pyramid alone."""

import re

from torch import Tensor

# What torchvision's modules rename by themselves when they load one of its older files: single convolutions that later
# became the first element of a Sequential.
_OLD = (
    (r"^(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
)


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a torchvision detector under our names, without counters that have no effect."""
    return {_ours(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _ours(name: str) -> str:
    name = name.replace("backbone.body.", "backbone.").replace("backbone.fpn.", "fpn.")
    for old, new in _OLD:
        name = re.sub(old, new, name)
    return name
