"""A student that begins with its teacher's neck or head, as ICD and FGD train theirs."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kd.detectors.base import Detector

Part = Literal["neck", "head"]


@torch.no_grad()
def inherit(student: Detector, teacher: Detector, parts: Sequence[Part]) -> list[str]:
    """Copy these parts of `teacher` into `student`, which are the pyramid, and all that stands behind it; the names of
    what was copied.

    Raises ValueError, naming both sides, where a part differs in shape; nothing is copied then.
    """
    found: list[str] = []
    for part in parts:
        mine, its = _part(student, part), _part(teacher, part)
        wrong = [
            f"{name}: the student's {_shape(mine.get(name))}, the teacher's {_shape(its.get(name))}"
            for name in [*mine, *(name for name in its if name not in mine)]
            if _shape(mine.get(name)) != _shape(its.get(name))
        ]
        if wrong:
            raise ValueError(
                f"the student cannot inherit the teacher's {part}: {'; '.join(wrong[:3])} ({len(wrong)} differ); give "
                f"both the same width, levels and head, or take {part} out of the teacher's inherit"
            )
        found += mine
    its = teacher.state_dict()
    for name, value in student.state_dict(keep_vars=True).items():
        if name in found:
            value.copy_(its[name])
    return found


def _part(detector: Detector, part: Part) -> dict[str, Tensor]:
    """The weights and buffers of a part, by their names in the detector."""
    state = detector.state_dict()
    if part == "neck":
        return {name: value for name, value in state.items() if name.startswith("fpn.")}
    behind = (name for name in state if "." in name and not name.startswith(("backbone.", "fpn.")))
    return {name: state[name] for name in behind}


def _shape(value: Tensor | None) -> str:
    return "none" if value is None else "x".join(map(str, value.shape)) or "one number"
