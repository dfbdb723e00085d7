"""A method at a share of the task's loss, whatever the scale of its own: weights that need no search to begin with."""

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """What a method's terms are multiplied by so that they are `share` of the task's loss.

    It is measured over the first `steps` steps in which the method is on: the first is only measured, the others go
    with what was measured so far, and from then on the scale stays as it is, so that the method's loss may fall. It is
    made of sums over the global batch, equal on every rank, and lies in a buffer, so that it is saved and restored.
    """

    seen: Tensor
    """(3,) float64: task loss, method's loss and number of the steps that were measured."""

    def __init__(self, share: float, steps: int) -> None:
        super().__init__()
        self.share, self.steps = share, steps
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def scale(self) -> Tensor:
        """A scalar; 0 before the first step is measured."""
        task, own, count = self.seen.unbind()
        return torch.where(count > 0, self.share * task / own.clamp(min=torch.finfo(torch.float64).tiny), 0.0).float()

    @torch.no_grad()
    def see(self, task: float, own: float) -> None:
        """One step's losses over the global batch; nothing is measured where the method had nothing to say."""
        if task <= 0 or own <= 0:
            return
        # Without asking the device whether it is still measuring.
        more = self.seen + torch.tensor([task, own, 1.0], dtype=torch.float64).to(self.seen.device)
        self.seen.copy_(torch.where(self.seen[2] < self.steps, more, self.seen))
