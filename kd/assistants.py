"""How an assistant learns: its own gradients, summed over ranks as one flat buffer, and its own optimizer.

The student's head takes part in the assistant's loss but receives no gradient from it: gradients are asked for the
assistant's parameters alone, so the head's hooks (DeepSpeed's among them) never fire.
"""

from typing import Any

import torch
from torch import Tensor

from data_sharding.world import World
from kd.methods.base import Assistant


class NonFiniteGradient(FloatingPointError):
    """An assistant's gradient is NaN or infinite. Every rank raises it together, and none has stepped."""

    def __init__(self, message: str, here: bool) -> None:
        super().__init__(message)
        self.here = here
        """Whether this rank's own part is to blame."""


class AssistantTrainer:
    """An assistant with its optimizer and the gradients gathered so far in this step."""

    def __init__(self, assistant: Assistant, world: World) -> None:
        self.assistant = assistant
        self.optimizer = assistant.optimizer()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._world = world
        self._parameters = [p for p in assistant.parameters() if p.requires_grad]
        self._gathered: Tensor | None = None

    def learn(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this micro-batch's share of the assistant's loss, to the step's gradient."""
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten().to(p.dtype)
                for p, g in zip(self._parameters, gradients, strict=True)
            ]
        )
        self._gathered = flat if self._gathered is None else self._gathered + flat

    def step(self, progress: float = 0.0) -> None:
        """Sum the gathered gradients over ranks, clip, and step at `progress` of the schedule; every rank ends with the
        same weights."""
        if self._gathered is None:
            return
        total = self._world.sum(self._gathered)
        if not total.isfinite().all():
            here = not bool(self._gathered.isfinite().all())
            raise NonFiniteGradient(f"the gradient of the assistant of {type(self.assistant).__module__}", here)
        if self.assistant.clip is not None:
            total = total * (self.assistant.clip / (total.norm() + 1e-6)).clamp(max=1)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.assistant.rate(progress)
        for parameter, gradient in zip(
            self._parameters, total.split([p.numel() for p in self._parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        torch.clear_autocast_cache()  # else the advice of this very step would come from the weights before it
        self.optimizer.zero_grad(set_to_none=True)
        self._gathered = None

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, equal on every rank."""
        return {"assistant": self.assistant.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.assistant.load_state_dict(state["assistant"])
        self.optimizer.load_state_dict(state["optimizer"])
