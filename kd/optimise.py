"""What the student's optimizer does at each step: parameter groups, schedules and the frozen backbone.

Everything here is a pure function of the settings and the step, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd.distiller import Distiller


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the student is optimised."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    """Peak learning rate at the global batch."""
    momentum: float = 0.9
    """SGD's momentum; AdamW's beta1."""
    weight_decay: float = 1e-4
    """For weights; normalisers and biases are not decayed."""
    backbone_lr: float = 1.0
    """The backbone's learning rate as a multiple of `lr`."""
    steps: int = 90_000
    """Optimizer steps of the whole schedule."""
    batch: int = 16
    """Images per optimizer step, over all workers and micro-batches."""
    accumulate: int = 1
    """Micro-batches per step and worker: less memory, the same gradient."""
    warmup: int = 500
    """Steps over which the learning rate grows linearly from `lr / 1000`."""
    schedule: Literal["step", "flat_cosine"] = "step"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """`step`: shares of the schedule at which the learning rate is divided by ten."""
    flat: float = 0.5
    """`flat_cosine`: share of the schedule before the cosine begins."""
    final: float = 0.05
    """`flat_cosine`: the learning rate at the end as a share of `lr`."""
    clip_norm: float | None = None
    """Largest 2-norm of the gradient of all that the optimizer owns; None: not clipped."""
    ema: float | None = None
    """Decay per step of the average of the weights that is evaluated and kept; None: the weights themselves."""

    def __post_init__(self) -> None:
        for name in ("lr", "steps", "batch", "accumulate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "backbone_lr", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones are growing shares of the schedule in (0, 1), got {self.milestones}")
        if not 0 <= self.flat <= 1 or not 0 <= self.final <= 1:
            raise ValueError(f"flat and final are shares in [0, 1], got {self.flat} and {self.final}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0 or null, got {self.clip_norm}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be in (0, 1) or null, got {self.ema}")

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        progress = step / self.steps
        if self.schedule == "step":
            factor = 0.1 ** sum(progress >= m for m in self.milestones)
        elif progress < self.flat:
            factor = 1.0
        else:
            done = (progress - self.flat) / max(1e-9, 1 - self.flat)
            factor = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        warm = 1.0 if step >= self.warmup else 1e-3 + (1 - 1e-3) * step / self.warmup
        return self.lr * factor * warm


def parameter_groups(distiller: Distiller, config: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: backbone, detector and methods, each with and without decay.

    The methods' parameters are groups of their own, so that ZeRO's flat buffers of the student are the same with and
    without distillation.
    """
    backbone = {id(p) for p in distiller.student.backbone.parameters()}
    bare = {id(p) for p in _undecayed(distiller)}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in distiller.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "methods" if name.startswith("methods.") else "backbone" if id(parameter) in backbone else "detector"
        found.setdefault(f"{part}/bare" if id(parameter) in bare else part, []).append(parameter)
    return [
        {
            "params": parameters,
            "name": name,
            "lr": config.lr,
            "weight_decay": 0.0 if name.endswith("/bare") else config.weight_decay,
        }
        for name, parameters in sorted(found.items())
    ]


def _undecayed(module: nn.Module) -> Iterator[nn.Parameter]:
    norms = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias" or isinstance(part, norms):
                yield parameter


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Plain torch optimizers: any engine can shard them."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))


def set_rates(groups: list[dict[str, Any]], config: OptimConfig, step: int, frozen: bool) -> dict[str, float]:
    """Write the step's learning rates into the optimizer's groups; the rate per part, for the log.

    A frozen backbone gets neither rate nor decay: its weights stay bit-equal.
    """
    rate = config.learning_rate(step)
    rates: dict[str, float] = {}
    for group in groups:
        part = group["name"].removesuffix("/bare")
        held = frozen and part == "backbone"
        group["lr"] = 0.0 if held else rate * (config.backbone_lr if part == "backbone" else 1.0)
        group["weight_decay"] = 0.0 if held or group["name"].endswith("/bare") else config.weight_decay
        rates[part] = group["lr"]
    return rates


def clip_gradients(groups: list[dict[str, Any]], limit: float | None) -> float:
    """Scale all gradients so that their 2-norm is at most `limit`; the norm before, over all groups.

    Each tensor's norm is float32; their squares are added group by group in float64, so that a group without
    gradient (methods that are off) leaves the other groups' clipping bit-equal.
    """
    gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
    # One pass over the gradients: a copy of them in float64 would cost a small detector a tenth of its step.
    norms = [torch.stack(torch._foreach_norm(found, 2, torch.float32)) for found in gradients if found]  # pyright: ignore[reportPrivateImportUsage]
    squares = [found.double().square().sum() for found in norms]
    norm = float(torch.stack(squares).cpu().numpy().cumsum()[-1] ** 0.5) if squares else 0.0
    if limit is not None and norm > limit:
        for found in gradients:
            for gradient in found:
                gradient.mul_(limit / (norm + 1e-6))
    return norm


class Ema:
    """An exponential moving average of the student's weights and buffers, in float32, equal on every rank."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in student.state_dict().items()}

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Move towards the weights after step `step`; the decay grows in over the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in student.state_dict().items():
            if value.shape != self.average[name].shape:
                raise ValueError(
                    f"{name} is kept in shards, so its average cannot be updated on one rank; set optim.ema to null, "
                    "or resources.zero to 0, 1 or 2"
                )
            if value.is_floating_point():
                self.average[name].lerp_(value.to(self.average[name].dtype), 1 - decay)
            else:
                self.average[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, by the student's names."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; names must agree."""
        if state.keys() != self.average.keys():
            raise ValueError("the checkpoint's averaged weights are of another student; use its recipe or a new name")
        for name, value in state.items():
            self.average[name].copy_(value)
