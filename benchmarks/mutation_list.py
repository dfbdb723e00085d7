"""What `benchmarks.mutations` changes in each method's file: text that is there once, and what it becomes."""

from collections.abc import Mapping
from pathlib import Path

Change = tuple[str, str]

LOSSES = "teacher: Taps, batch: Batch, advice: Advice) -> dict[str, Tensor]:\n"
NO_TAPS = "teacher = Taps(None if teacher.c5 is None else 0 * teacher.c5, tuple(0 * x for x in teacher.pyramid))"
NO_TEACHER, SWAPPED, NO_MASK = "no teacher term", "teacher is student", "no mask"

OF_TAPS: Mapping[str, Change] = {
    NO_TEACHER: (LOSSES, f"{LOSSES}        {NO_TAPS}\n"),
    SWAPPED: (LOSSES, f"{LOSSES}        student, teacher = teacher, student\n"),
}
"""Of a method that compares maps."""
OF_HEADS: Mapping[str, Change] = {NO_TEACHER: ("advice.teacher_outputs", "outputs.detach()")}
"""Of one that compares answers: the student is its own teacher."""

CHANGES: Mapping[str, Mapping[str, Change]] = {
    "at": OF_TAPS,
    "clsd": {
        NO_TEACHER: ("seen[mine.truth[on]]", "0 * seen[mine.truth[on]]"),
        SWAPPED: ("(pooled(found, size) - pooled(wanted.detach(), size))", "(pooled(found.detach(), size) - 0)"),
        NO_MASK: ("on = mine.positive", "on = mine.allowed"),
    },
    "cwd": OF_TAPS,
    "defeat": {
        **OF_TAPS,
        NO_MASK: ("(error * mask).sum", "error.sum"),
        "one mask": ("_mean_over(error, ~covered)", "_mean_over(error, covered)"),
    },
    "drkd": {**OF_TAPS, "one image": (".index_add(0, image, sums)", ".index_add(0, 0 * image, sums)")},
    "fgd": {
        **OF_TAPS,
        NO_MASK: ("masks[:, None] * spatial_attention(teacher", "spatial_attention(teacher"),
        "no attention": ("attended * channel_attention(teacher, self.temperature)", "attended"),
    },
    "fgfi": {**OF_TAPS, NO_MASK: ("student.movedim(1, -1)[mask], teacher.movedim(1, -1)[mask]", "student, teacher")},
    "fitnet": {**OF_TAPS, NO_MASK: ("(error.mean(1) * mask)", "error.mean(1)")},
    "fkd": {**OF_TAPS, NO_MASK: ("distance(a, t, self._attention(s, t))", "distance(a, t)")},
    "freekd": {
        **OF_TAPS,
        NO_MASK: ('details.abs() * advice.notes[f"{level}/{i}"].sum(dim=1)[:, None, None]', "details.abs()"),
    },
    "gid": {
        **OF_HEADS,
        SWAPPED: ("soften(mine, its, 1.0)", "soften(its, mine, 1.0)"),
        NO_MASK: ("there, label = near.positive", "there, label = near.allowed"),
    },
    "hinton": {
        **OF_HEADS,
        SWAPPED: ("soften(mine, its,", "soften(its, mine,"),
        NO_MASK: ("divergence * counted", "divergence"),
    },
    "hkd": OF_TAPS,
    "hmkd": {
        NO_TEACHER: ("value_error(mine, values,", "value_error(mine, 0 * values,"),
        SWAPPED: OF_TAPS[SWAPPED],
        NO_MASK: ("attention * value_error", "value_error"),
        "no mask of others": (
            "covered.greatest(1 / covered.cells)[:, None] * squared_error(s, t)",
            "squared_error(s, t)",
        ),
    },
    "icd": {
        NO_TEACHER: ('value_error(mine, advice.notes["values"],', 'value_error(mine, 0 * advice.notes["values"],'),
        SWAPPED: OF_TAPS[SWAPPED],
        NO_MASK: ('advice.notes["attention"] * error', "error"),
    },
    "ld": {
        **OF_HEADS,
        SWAPPED: (
            "softened_kl(mine.edges[somewhere], its.edges[somewhere].detach()",
            "softened_kl(its.edges[somewhere], mine.edges[somewhere]",
        ),
        NO_MASK: ("sides.mean(dim=1) * weight[somewhere]", "sides.mean(dim=1)"),
    },
    "lgd": {
        NO_TEACHER: ("student.pyramid), advice.pyramid,", "student.pyramid), (0 * x for x in advice.pyramid),"),
        SWAPPED: ("x in student.pyramid), advice.pyramid,", "x in advice.pyramid), student.pyramid,"),
    },
    "mgd": {**OF_TAPS, NO_MASK: ("masked(s, self._chances(batch, i, s), self.masked)", "s")},
    "mkd": {**OF_TAPS, NO_MASK: ("filtered(s, self._mask(batch, level, s))", "s")},
    "od": {
        **OF_HEADS,
        SWAPPED: OF_TAPS[SWAPPED],
        "heads swapped": ("(outputs, advice.teacher_outputs,", "(advice.teacher_outputs, outputs,"),
        "no hint's teacher": OF_TAPS[NO_TEACHER],
    },
    "pkd": OF_TAPS,
    "scalekd": {
        **OF_TAPS,
        "no advice": ("distill_losses(outputs, advice.outputs,", "distill_losses(outputs, outputs,"),
        "heads swapped": ("distill_losses(outputs, advice.outputs,", "distill_losses(advice.outputs, outputs,"),
    },
    "tinykd": {**OF_TAPS, NO_MASK: ("squared_error(s, t).mean(dim=1) * weight", "squared_error(s, t).mean(dim=1)")},
    "zoominnet": {
        **OF_TAPS,
        NO_MASK: ("(errors * weights)", "errors"),
        "no disagreement": ("(a - b).abs() * object_bumps", "object_bumps"),
        "no bump": ("((a - b).abs() * object_bumps(batch, x, stride))", "(a - b).abs()"),
        "its own teacher": OF_HEADS[NO_TEACHER],
    },
}
"""By method."""


def every_mutation(root: Path) -> Mapping[str, Mapping[str, Change]]:
    """All changes; ValueError where a method of `kd/methods` has none."""
    methods = {path.stem for path in (root / "kd" / "methods").glob("*.py")} - {"__init__", "base"}
    if methods != CHANGES.keys():
        raise ValueError(f"benchmarks/mutation_list.py and kd/methods differ in {sorted(methods ^ CHANGES.keys())}")
    return CHANGES
