"""Bring a student's pyramid to the teacher's channels, and give each level a module of its own."""

from typing import cast

from torch import Tensor, nn


class MatchChannels(nn.Module):
    """One convolution per level where the widths differ; where they are equal nothing, or, with `always`, a learned
    convolution that starts as the identity."""

    def __init__(self, student: int, teacher: int, levels: int, kernel: int = 1, always: bool = False) -> None:
        super().__init__()

        def adapter() -> nn.Module:
            if student == teacher and not always:
                return nn.Identity()
            conv = nn.Conv2d(student, teacher, kernel, padding=kernel // 2)
            return _as_identity(conv) if student == teacher else conv

        self.levels = nn.ModuleList(adapter() for _ in range(levels))

    def forward(self, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(B, C_student, H, W) per level -> (B, C_teacher, H, W) per level."""
        return tuple(adapter(x) for adapter, x in zip(self.levels, pyramid, strict=True))


def _as_identity(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.dirac_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def same_levels(student: tuple[int, ...], teacher: tuple[int, ...]) -> int:
    """The number of levels of two pyramids with these strides, which must be equal after alignment."""
    if len(student) != len(teacher):
        raise ValueError(
            f"the student's pyramid has strides {student}, the aligned teacher's {teacher}; give both detectors the "
            "same levels"
        )
    return len(student)


def each(blocks: nn.ModuleList, pyramid: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What each block makes of its level: (B, C, H, W) per level -> the same."""
    return tuple(cast(Tensor, block(x)) for block, x in zip(blocks, pyramid, strict=True))
