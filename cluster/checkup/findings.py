"""What `cluster.doctor` finds and how it says it: areas of findings, and at the end a plain list of what to change."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.terminal import table

Verdict = Literal["ok", "note", "warn", "FAIL"]
"""`note`: worth knowing; `warn`: the run would go, and be worse than it could be; `FAIL`: it would break."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    found: str
    verdict: Verdict = "ok"
    change: str | None = None
    """What to do about it, with the exact settings where there are any."""


@dataclass(frozen=True, kw_only=True)
class Area:
    """What belongs together on the page."""

    title: str
    findings: Sequence[Finding] = ()
    tables: Sequence[tuple[str, Sequence[Mapping[str, object]]]] = field(default_factory=tuple)
    """Title and rows of what needs more than a line."""


def share(part: float, whole: float) -> str:
    """`part` of `whole` in percent, as a person writes it."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.1f} %"


def size(count: float) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def show(area: Area) -> None:
    """Print an area's tables and then its findings."""
    for title, rows in area.tables:
        table(title, rows)
    table(area.title, [{"check": f.check, "verdict": f.verdict, "found": f.found} for f in area.findings], left=True)


def close(findings: Sequence[Finding]) -> int:
    """Print what to change, the worst first; the exit code: 1 where something would break."""
    breaking = [f for f in findings if f.verdict == "FAIL"]
    weaker = [f for f in findings if f.verdict == "warn"]
    say = sys.stdout.write
    if not breaking and not weaker:
        say("Nothing to change.\n")
        return 0
    say("What to change\n")
    for number, finding in enumerate([*breaking, *weaker], 1):
        kind = "must" if finding.verdict == "FAIL" else "should"
        say(f"{number:3d}. {kind}: {finding.check}: {finding.change or finding.found}\n")
    must = "nothing must change" if not breaking else f"{len(breaking)} would break the run"
    say(f"{must}; {len(weaker)} would make it better\n")
    return 1 if breaking else 0
