"""Who runs backward and the optimizer: a small protocol, and its plain implementation without DeepSpeed.

The convention that makes one rank, many ranks and accumulation agree: a loss is this micro-batch's *share* of the
global batch's loss, and an engine *sums* the gradients of the shares over micro-batches and ranks.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from data_sharding.world import World
from kd.distiller import Distiller
from kd.optimise import OptimConfig, build_optimizer, clip_gradients, parameter_groups

Precision = Literal["fp32", "bf16"]


class Engine(Protocol):
    """What the step needs of whoever owns the optimizer. All ranks call everything equally often."""

    distiller: Distiller

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; `lr` and `weight_decay` may be set before each step."""
        ...

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """The distiller's forward, in the engine's precision."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a share of the loss."""
        ...

    def step(self) -> float | None:
        """After the last micro-batch: reduce, clip, step, clear. The gradient's norm before clipping, if known; whoever
        gets one that is not finite (or -1) must not go on with these weights."""
        ...

    def forget(self, part: str) -> None:
        """Drop the optimizer's memory of a part that was frozen, so that its first real step is a first step."""
        ...

    def student_state(self) -> dict[str, Tensor]:
        """The student's whole state dict, on every rank, cut off from training."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the training state into `folder`."""
        ...

    def load(self, folder: Path, ranks: int | None = None) -> None:
        """Restore what `save` wrote, bit for bit, on `ranks` ranks; None: on as many as there are now."""
        ...


class PlainEngine:
    """Plain torch on one device per rank: for laptops, tests, benchmarks and machines without DeepSpeed."""

    def __init__(
        self, distiller: Distiller, config: OptimConfig, world: World | None = None, precision: Precision = "fp32"
    ) -> None:
        self.distiller = distiller
        self.optimizer = build_optimizer(parameter_groups(distiller, config), config)
        self._config = config
        self._world = world or World()
        self._precision = precision

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        device = next(self.distiller.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self._precision == "bf16" else nullcontext():
            return self.distiller(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float | None:
        if self._world.size > 1:
            # A ring of ranks sums a number in an order that depends on its place in the buffer: the student has its
            # own, so that methods beside it do not change its bits.
            for own in (False, True):
                groups = [g for g in self.groups if g["name"].startswith("methods") == own]
                self._sum_gradients([p for group in groups for p in group["params"]])
        norm = clip_gradients(self.groups, self._config.clip_norm)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def forget(self, part: str) -> None:
        for group in self.groups:
            if group["name"].removesuffix("/bare") == part:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)

    def student_state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.distiller.student.state_dict().items()}

    def save(self, folder: Path) -> None:
        if self._world.rank == 0:
            state = {"distiller": self.distiller.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "plain_engine.pt")

    def load(self, folder: Path, ranks: int | None = None) -> None:
        state = torch.load(folder / "plain_engine.pt", map_location="cpu", weights_only=True)
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sum_gradients(self, parameters: list[Tensor]) -> None:
        """One flat all-reduce; a parameter without gradient on this rank counts as zero."""
        if not parameters:
            return
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        total = self._world.sum(flat)
        for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
