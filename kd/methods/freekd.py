"""FreeKD (Zhang et al., CVPR 2024, arXiv:2311.12079): imitate the details of the teacher's map, its Haar bands at three
halvings, most where prompts that the detection task has taught say that details matter. Reads the teacher's pyramid.

The prompts are an assistant: the teacher's map, put together again from bands that their masks have weighed, must be
detected on, while tokens keep apart (dice). Departures: they learn beside the student and through its head, not before
it and through the teacher's; the smooth band is left whole; each halving has its masks for its three bands together, as
in the authors' code; the paper's relational weight of channels and the code's term on box outputs are left out.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_sharding.batch import Batch, Outputs, Taps
from kd.blocks.adapt import MatchChannels, same_levels
from kd.blocks.divergence import share_of_mean, squared_error
from kd.blocks.frequency_prompt import FrequencyPrompt, overlap
from kd.blocks.haar import bands, restore
from kd.methods import base
from kd.methods.base import Advice, Method, MethodConfig, Pair, Scene


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    frequency: float = 1.0
    """Weight of the details."""
    whole: float = 5.0
    """Weight of the mean squared error of the maps themselves."""
    tokens: int = 6
    """Prompts of each halving; a detail's weight is the sum of their masks."""
    halvings: int = 3
    apart: float = 1.0
    """Weight of the tokens' overlap in the prompts' own loss."""
    learning_rate: float = 1e-3
    """Of the prompts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights("frequency", "whole", "apart")
        self.check_positive("tokens", "halvings", "learning_rate")

    @property
    def assisted(self) -> bool:
        return self.frequency != 0


class Loss(Method):
    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config = config
        levels = same_levels(pair.student.strides, pair.teacher.strides)
        self.match = MatchChannels(pair.student.pyramid_channels, pair.teacher.pyramid_channels, levels, always=True)

    def losses(self, student: Taps, outputs: Outputs, teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:
        pairs = list(zip(self.match(student.pyramid), teacher.detach().pyramid, strict=True))
        images, terms = batch.totals["images"], dict[str, Tensor]()
        if self.config.frequency:
            # The transform is linear: the bands of the difference are the differences of the bands.
            found = [
                share_of_mean(details.abs() * advice.notes[f"{level}/{i}"].sum(dim=1)[:, None, None], images)
                for level, (s, t) in enumerate(pairs)
                for i, details in enumerate(bands(s.float() - t.float(), self.config.halvings)[1])
            ]
            terms["feat"] = self.config.frequency * torch.stack(found).sum()
        if self.config.whole:
            errors = [share_of_mean(squared_error(s, t), images) for s, t in pairs]
            terms["whole"] = self.config.whole * torch.stack(errors).sum()
        return terms


class Assistant(base.PyramidAssistant):
    """The prompts of every level, and what brings the teacher's map to the student's head."""

    def __init__(self, config: Config, pair: Pair) -> None:
        super().__init__()
        self.config, self.levels = config, same_levels(pair.student.strides, pair.teacher.strides)
        width = pair.teacher.pyramid_channels
        self.prompts = nn.ModuleList(FrequencyPrompt(width, config.tokens, config.halvings) for _ in range(self.levels))
        self.match = MatchChannels(width, pair.student.pyramid_channels, self.levels, always=True)

    def forward(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Both pyramids -> one of the student's shape, then the masks (B, T, h, w), level by level, finest halving
        first. At first the pyramid is the teacher's: twice a mask of 1/2 is 1."""
        weighed, masks = [], []
        for prompt, level in zip(self.prompts, teacher, strict=True):
            low, details = bands(level.float(), self.config.halvings)
            found = prompt(*details)
            kept = tuple(2 * m.mean(dim=1)[:, None, None] * x for m, x in zip(found, details, strict=True))
            weighed.append(restore(low, kept, (level.shape[2], level.shape[3])))
            masks += found
        return *self.match(tuple(weighed)), *masks

    def advise(self, made: tuple[Tensor, ...], scene: Scene) -> Advice:
        masks, halvings = made[self.levels :], self.config.halvings
        notes = {f"{i // halvings}/{i % halvings}": mask for i, mask in enumerate(masks)}
        return replace(super().advise(made[: self.levels], scene), notes=notes)

    def loss(self, advice: Advice, scene: Scene) -> Tensor:
        share = self.config.apart / len(advice.notes) / scene.batch.totals["images"].clamp(min=1)
        return (
            super().loss(advice, scene) + share * torch.stack([overlap(m).sum() for m in advice.notes.values()]).sum()
        )

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.config.learning_rate)
