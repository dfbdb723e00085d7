"""Scale-decoupled features (ScaleKD, CVPR 2023, section 3.1): one residual block at several dilations.

A small dilation answers to small objects, a large one to large objects; concatenating the branches keeps them apart.
Per-token MLPs are stacks of 1x1 convolutions (a true flatten and a full layer cannot exist for images of any size:
ambiguity S8), so everything here stays a map. Shape letters: B images, C channels, H x W cells.
"""

import hashlib
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.blocks.divergence import squared_error

TeacherSide = Literal["frozen", "shared", "trained"]


def token_mlp(inputs: int, outputs: int) -> nn.Sequential:
    """A two-layer perceptron at every position: (B, inputs, H, W) -> (B, outputs, H, W)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))


class DilatedBlock(nn.Module):
    """u + W3 relu(W2 relu(W1 u)), 1x1 - 3x3 - 1x1, whose 3x3 convolution is dilated as each call asks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 4, 1)
        self.spread = DilatedConv(width // 4)
        self.expand = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor, dilation: int) -> Tensor:
        """(B, C, H, W) -> same shape."""
        return x + self.expand(F.relu(self.spread(F.relu(self.reduce(x)), dilation)))


class DilatedConv(nn.Conv2d):
    """A 3x3 convolution that keeps the grid, with one set of weights for every dilation."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3)

    def forward(self, input: Tensor, dilation: int = 1) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=dilation, dilation=dilation)


class ScaleDecoupled(nn.Module):
    """One branch per dilation, its own token MLP, and the concatenation of all."""

    def __init__(self, width: int, token_width: int, dilations: tuple[int, ...], weight_sharing: bool) -> None:
        super().__init__()
        self.dilations = dilations
        self.blocks = nn.ModuleList(DilatedBlock(width) for _ in range(1 if weight_sharing else len(dilations)))
        self.tokens = nn.ModuleList(token_mlp(width, token_width) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, branches * token_width, H, W)."""
        shared = len(self.blocks) == 1
        branches = (self.blocks[0 if shared else i](x, dilation) for i, dilation in enumerate(self.dilations))
        return torch.cat([tokens(branch) for tokens, branch in zip(self.tokens, branches, strict=True)], dim=1)


def freeze_orthogonal(module: nn.Module, seed: int) -> nn.Module:
    """Give every convolution orthogonal weights and no bias, all drawn from `seed` alone, and freeze the module: a
    random map that keeps distances about as they are and is the same on every rank and after every resume."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.orthogonal_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module.requires_grad_(False)


class DecoupledError(nn.Module):
    """|e_T - e_S|^2 at every position, summed over channels, with both sides' adapters and branches.

    `teacher_side` (ambiguity S10): `frozen` at random weights drawn from `seed`; `shared`, the student's own module
    without gradient, tokens standardised; or `trained` too, where both sides can agree on a constant. With
    `same_start` the student's side of a frozen teacher's begins at the same weights, as far as the shapes are the
    same: the error then tells the maps apart, not two random networks.
    """

    def __init__(
        self, student: int, teacher: int, width: int, token_width: int, dilations: tuple[int, ...], *,
        weight_sharing: bool, teacher_side: TeacherSide, seed: int, same_start: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        sdf = (width, token_width, dilations, weight_sharing)
        self.teacher_side: TeacherSide = teacher_side
        self.student_adapter, self.student_sdf = token_mlp(student, width), ScaleDecoupled(*sdf)
        # Sharing takes the student's adapter too where it fits, else one frozen at random.
        own_adapter = teacher_side != "shared" or student != teacher
        self.teacher_adapter = token_mlp(teacher, width) if own_adapter else None
        self.teacher_sdf = ScaleDecoupled(*sdf) if teacher_side != "shared" else None
        if teacher_side != "trained":
            for name, module in (("adapter", self.teacher_adapter), ("sdf", self.teacher_sdf)):
                if module is not None:
                    freeze_orthogonal(module, _seed(name, teacher, *sdf, seed))
        if same_start and self.teacher_adapter is not None and self.teacher_sdf is not None:
            self.student_sdf.load_state_dict(self.teacher_sdf.state_dict())
            if student == teacher:
                self.student_adapter.load_state_dict(self.teacher_adapter.state_dict())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, C_student, H, W) and (B, C_teacher, H, W), the latter without gradient -> (B, H, W)."""
        if student.shape[-2:] != teacher.shape[-2:]:
            raise ValueError(
                f"the student's c5 has {tuple(student.shape[-2:])} cells, the teacher's {tuple(teacher.shape[-2:])}; "
                "align the teacher's taps to the student's grid first"
            )
        found = self.student_sdf(self.student_adapter(student))
        with nullcontext() if self.teacher_side == "trained" else torch.no_grad():
            adapter = self.student_adapter if self.teacher_adapter is None else self.teacher_adapter
            sdf = self.student_sdf if self.teacher_sdf is None else self.teacher_sdf
            target = sdf(adapter(teacher))
        if self.teacher_side == "shared":
            found, target = _standardised(found), _standardised(target)
        return squared_error(found, target).sum(dim=1)


def _seed(*settings: object) -> int:
    """A seed from the settings alone, since Python's own hash of text differs from process to process."""
    return int.from_bytes(hashlib.sha256(repr(settings).encode()).digest()[:7], "big")


def _standardised(x: Tensor) -> Tensor:
    """Layer normalisation over channels without affine: (B, C, H, W) -> same shape."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
