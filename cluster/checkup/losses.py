"""The doctor on the weights of losses: which term is too weak or too strong beside the task, and what would mend it."""

from collections.abc import Mapping
from dataclasses import fields, replace

from cluster import build
from cluster.checkup.findings import Area, Finding, Verdict
from cluster.checkup.steps import Bench, Dry, dry_step, terms_with
from kd.methods.base import MethodConfig
from kd.sight import told_apart

HEALTHY = (0.05, 0.30)
"""A distillation term's share of the task loss."""
TARGET = 0.15
APART = 0.01
"""The least share of a teacher's map that should differ from image to image."""
NOTHING = 0.002
"""A term below this that comes through an assistant has not begun: an assistant starts as the student itself."""


def examine(bench: Bench) -> tuple[Area, list[Dry]]:
    """A dry step of every lesson, or of the plain student; the findings, and what the steps showed."""
    names = _lessons(bench)
    findings = [_sight(bench, teacher) for teacher in bench.loaded]
    rows: list[dict[str, object]] = []
    steps: list[Dry] = []
    for name in names or [None]:
        try:
            dry = dry_step(bench, name)
        except Exception as error:
            # Whatever a run would die of is what the doctor is asked for.
            change = str(error) or type(error).__name__
            findings.append(
                Finding(check=f"step of {name or 'student'}", found="breaks", verdict="FAIL", change=change)
            )
            continue
        steps.append(dry)
        findings.append(_step(dry, name))
        if name is not None:
            term_rows, term_findings = _terms(bench, name, dry)
            rows += term_rows
            findings += term_findings
    images = sum(len(look.batch) for look in bench.looks)
    title = f"terms with the first weights, {images} images, each method at its full strength"
    return Area(title="losses", findings=findings, tables=[(title, rows)] if rows else []), steps


def _sight(bench: Bench, teacher: str) -> Finding:
    """What this teacher tells apart, of all that is read of it."""
    shares = told_apart([look.taught[teacher] for look in bench.looks], bench.strides)
    told = ", ".join(f"{name} {value:.2g}" for name, value in ((n, 100 * s) for n, s in shares.items()))
    blind = [name for name, value in shares.items() if value < APART]
    change = (
        f"{' and '.join(blind)} of this teacher: nearly the same for every image, so what reads nothing else teaches "
        "nothing of an image; train the teacher with a smaller optim.backbone_lr, or take another tap (scalekd: sdf.on)"
    )
    return Finding(
        check=f"sight of {teacher}",
        found=f"% of each map that differs from image to image: {told or 'one image a batch cannot tell'}",
        verdict="warn" if blind else "ok",
        change=change if blind else None,
    )


def task_loss(losses: Mapping[str, float]) -> float:
    """What the shares are of."""
    return sum(value for name, value in losses.items() if name.startswith("task/"))


def judged(share: float, assisted: bool) -> str:
    """The verdict on a term's share of the task loss."""
    if assisted and abs(share) < NOTHING:
        return "begins later"
    return "weak" if share < HEALTHY[0] else "dominates" if share > HEALTHY[1] else "fine"


def _lessons(bench: Bench) -> list[str]:
    """The names of the lessons that can be tried."""
    return [lesson.name for lesson in build.lessons_of(bench.config, tuple(bench.loaded))]


def _step(dry: Dry, name: str | None) -> Finding:
    parts = [f"{term.removeprefix('task/')} {v:.3g}" for term, v in dry.losses.items() if term.startswith("task/")]
    told = f"task loss {task_loss(dry.losses):.3g} ({', '.join(parts)}), {1e3 * dry.seconds:.0f} ms per image"
    told += f", gradient norm {dry.norm:.3g}" if dry.norm is not None else ""
    return Finding(check=f"step of {name or 'student'}", found=told)


def _terms(bench: Bench, name: str, dry: Dry) -> tuple[list[dict[str, object]], list[Finding]]:
    """One row per term; findings for those out of proportion."""
    task = task_loss(dry.losses)
    terms = {term: value for term, value in dry.losses.items() if term.startswith("kd/")}
    rows: list[dict[str, object]] = []
    findings: list[Finding] = []
    for term, value in terms.items():
        share = value / task if task > 0 else 0.0
        word = judged(share, dry.assisted)
        rows.append(
            {
                "term": term.removeprefix("kd/"),
                "loss": value,
                "of the task": f"{share:.1%}",
                "of its gradient": _pull(dry, term),
                "verdict": word,
            }
        )
        if word in ("fine", "begins later"):
            continue
        change = f"{word} at {share:.1%} of the task loss (healthy: {HEALTHY[0]:.0%} to {HEALTHY[1]:.0%})"
        fix = _setting(bench, name, term, terms, share) if share > 0 else None
        change += f": {fix} makes it {TARGET:.0%}" if fix else ": change its weight" if share > 0 else ""
        verdict: Verdict = "warn"
        findings.append(
            Finding(check=f"weight of {term.removeprefix('kd/')}", found=word, verdict=verdict, change=change)
        )
    if not terms:
        change = f"distill.{name} adds nothing: no term at its strongest; give it a weight, or take it out"
        findings.append(Finding(check=f"terms of {name}", found="none", verdict="warn", change=change))
    return rows, findings


def _pull(dry: Dry, term: str) -> str:
    """The term's gradient at the student's pyramid as a share of the task's."""
    tap, pull = dry.pulls.get(term, ("pyramid", 0.0))
    return f"{pull:.1%}" + ("" if tap == "pyramid" else f" at {tap}")


def _setting(bench: Bench, name: str, term: str, terms: Mapping[str, float], share: float) -> str | None:
    """The override that brings a term to its target: `weight` where the method has no other term, else the setting
    that, tried out, scales this term and no other."""
    assert bench.config.distill
    method = name.rpartition("/")[2]
    settings = bench.config.distill[method]
    if settings.share is not None:  # `weight` says nothing then, and other settings only what each term has of it
        return f"distill.{method}.share={_short(settings.share * TARGET / share)}" if len(terms) == 1 else None
    if len(terms) == 1:
        return f"distill.{method}.weight={_short(settings.weight * TARGET / share)}"
    for field, value in _numbers(settings):
        try:
            one = terms if value is not None else terms_with(bench, name, replace(settings, **{field: 1.0}))
            two = terms_with(bench, name, replace(settings, **{field: 2 * (value or 1.0)}))
        except ValueError:  # a number that the method does not take
            continue
        if _scales(term, one, two):
            unit = (value or 1.0) * terms[term] / one[term]
            return f"distill.{method}.{field}={_short(unit * TARGET / share)}"
    return None


def _numbers(settings: MethodConfig) -> list[tuple[str, float | None]]:
    """The method's own settings that could be a weight: numbers, or open for a number."""
    shared = {field.name for field in fields(MethodConfig)}
    own = [(f.name, getattr(settings, f.name)) for f in fields(settings) if f.name not in shared]
    return [(name, value) for name, value in own if value is None or (isinstance(value, float) and value > 0)]


def _scales(term: str, one: Mapping[str, float], two: Mapping[str, float]) -> bool:
    """Whether doubling the setting doubled this term and left the others alone."""

    def ratio(name: str) -> float:
        return two.get(name, 0.0) / one[name] if one[name] else 1.0

    return abs(ratio(term) - 2) < 1e-2 and all(abs(ratio(other) - 1) < 1e-2 for other in one if other != term)


def _short(value: float) -> str:
    return f"{value:.2g}"
