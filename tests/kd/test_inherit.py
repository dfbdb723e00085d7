"""A student begins with its teacher's neck and head, or is told why it cannot."""

import pytest
import torch

from kd.inherit import inherit
from tests.kd import runs
from tests.kd.detecting import DETECTORS


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("parts", [(), ("neck",), ("head",), ("neck", "head")])
def test_the_parts_asked_for_are_the_teachers_and_no_other(name: str, parts: tuple[str, ...]) -> None:
    student, teacher = (runs.detector(seed, name=name) for seed in (0, 1))
    before, its = {k: v.clone() for k, v in student.state_dict().items()}, teacher.state_dict()
    copied = inherit(student, teacher, parts)  # pyright: ignore[reportArgumentType]
    state = student.state_dict()
    assert all(torch.equal(state[k], its[k] if k in copied else before[k]) for k in state)
    assert {"neck" if k.startswith("fpn.") else "head" for k in copied} == set(parts)
    assert not any(k.startswith("backbone.") for k in copied)
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters())), "copied, not shared"


def test_other_shapes_are_refused_with_both_sides_and_nothing_is_copied() -> None:
    student, teacher = runs.detector(0, width=32), runs.detector(1, width=16)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    told = r"inherit the teacher's head: head\S+: the student's \S+, the teacher's \S+; .*differ\); give both"
    with pytest.raises(ValueError, match=told):
        inherit(student, teacher, ("head",))
    assert runs.same(student.state_dict(), before)
