"""What every backbone file promises, and how torchvision's weights get in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from kd.blocks.norms import group_norm

Norm = Literal["frozen", "batch", "group"]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Settings that every backbone has."""

    name: str
    norm: Norm = "group"
    """`frozen`: BatchNorm with the statistics of `weights`, never updated. `batch`: plain BatchNorm, whose gradient
    depends on the batch mates. `group`: GroupNorm, for training from scratch with few images per GPU."""
    weights: str | None = None
    """Path to a state dict (.pth or .safetensors) with torchvision's names, or None for random weights."""

    def __post_init__(self) -> None:
        if self.norm == "group" and self.weights is not None:
            raise ValueError(
                f"norm 'group' cannot take weights ({self.weights}): BatchNorm statistics have no place in GroupNorm; "
                "use norm 'frozen' or 'batch' with weights, or weights null with norm 'group'"
            )


class Backbone(nn.Module, ABC):
    """Images to four stages. Parameters carry torchvision's names."""

    channels: tuple[int, int, int, int]
    """Of C2, C3, C4, C5."""
    strides: tuple[int, int, int, int] = (4, 8, 16, 32)
    """Pixels per cell of C2, C3, C4, C5."""
    recompute: bool = False
    """Whether training keeps only what enters a block and computes the rest again in the backward: less memory, a
    forward more, the same bits. It is no setting of the network and not stored with it."""

    def through(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """`x` through blocks, one after the other; see `recompute`."""
        for block in blocks:
            x = recomputed(block, x) if self.recompute and torch.is_grad_enabled() else block(x)
        return x

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) standardised -> (C2, C3, C4, C5), each ceil(H / stride) x ceil(W / stride)."""


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, of which the backward finds nothing but `x`. Running statistics see each batch once."""
    # DeepSpeed's stage 3 has a weight's shard in its place while it is away, which is no reason to stop.
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # no layer of a backbone draws
        determinism_check="none",
        context_fn=lambda: (nullcontext(), statistics_restored(block)),
    )  # pyright: ignore[reportReturnType]


@contextmanager
def statistics_restored(module: nn.Module) -> Iterator[None]:
    """Give every BatchNorm back the running statistics that it had before. (Computed without them, it would keep other
    things for its backward.)"""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase) and part.training]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """channels -> a new normaliser."""
    layers: dict[Norm, Callable[[int], nn.Module]] = {
        "frozen": FrozenBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "group": group_norm,
    }
    return layers[norm]


def initialise(backbone: Backbone, config: BackboneConfig, ignored: tuple[str, ...]) -> None:
    """Read `config.weights` into `backbone`, strictly. Keys beginning with one of `ignored` belong to torchvision's
    classifier and are left out. A frozen norm without weights is refused."""
    if config.weights is not None:
        load_weights(backbone, Path(config.weights), ignored)
    elif config.norm == "frozen":
        raise ValueError(
            f"backbone {config.name!r} has norm 'frozen' but no weights: a normaliser frozen at random statistics "
            "cannot train; set weights to a file of torchvision's weights, or norm to 'group' or 'batch'"
        )


def load_weights(module: nn.Module, path: Path, ignored: tuple[str, ...]) -> None:
    """Load a state dict strictly; missing, unexpected and misshapen entries are all named in one error.

    `num_batches_tracked` is left out on both sides: it has no effect with a fixed momentum.
    """
    found = {k: v for k, v in read_state(path).items() if not k.startswith(ignored) and _counts(k)}
    wanted = {k: v for k, v in module.state_dict().items() if _counts(k)}
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(v.shape)}" for k, v in wanted.items() if _differs(k, v, found)
    ]
    problems = {"missing": sorted(wanted.keys() - found), "unexpected": sorted(found.keys() - wanted), "shape": shapes}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{path} does not fit {type(module).__name__}: {told}")
    module.load_state_dict(found, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a torch file that holds nothing but tensors by name."""
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} do not exist; give the path of a .pth or .safetensors state dict")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is no plain state dict (tensors by name); save only `model.state_dict()` in it")
    return state


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into eval mode, then every part of it back into the mode it had."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _counts(key: str) -> bool:
    return not key.endswith("num_batches_tracked")


def _differs(key: str, wanted: Tensor, found: dict[str, Tensor]) -> bool:
    return key in found and found[key].shape != wanted.shape
