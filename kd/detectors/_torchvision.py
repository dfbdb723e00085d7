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


def folded(state: dict[str, Tensor], prefixes: tuple[str, ...], epsilon: float = 1e-5) -> dict[str, Tensor]:
    """Merge each BatchNorm (`x.1`) below `prefixes` into the convolution without bias before it (`x.0`): the same
    function, for a detector that learns no more."""
    found = dict(state)
    for name in [n for n in state if n.startswith(prefixes) and n.endswith(".1.running_var")]:
        block = name.removesuffix(".1.running_var")
        weight, bias, mean, variance = (
            found.pop(f"{block}.1.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (variance + epsilon).sqrt()
        found[f"{block}.0.weight"] = found[f"{block}.0.weight"] * scale[:, None, None, None]
        found[f"{block}.0.bias"] = bias - mean * scale
    return found


def _ours(name: str) -> str:
    name = name.replace("backbone.body.", "backbone.").replace("backbone.fpn.", "fpn.")
    for old, new in _OLD:
        name = re.sub(old, new, name)
    return name
