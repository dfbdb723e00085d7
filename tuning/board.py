"""What a person sees of a search: one table that changes in place, and one at the end."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.grammar import to_text
from cluster.terminal import table
from tuning.plan import Plan
from tuning.trials import ENDED, Found, Trial, better

STATES = ("running", "finished", "stopped", "failed")
EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
SHOWN = 12
"""Trials in the closing table."""


class Board:
    """The newest state, as a table or a line."""

    def __init__(self, plan: Plan, found: Found) -> None:
        self._plan, self._found = plan, found
        self._began, self._ended = time.monotonic(), len(_ended(found))

    def changed(self, found: Found) -> None:
        """Show this from now on."""
        self._found = found

    def line(self) -> str:
        """All in one line."""
        counts = Counter(trial.state for trial in self._found.trials)
        told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        return f"search {self._plan.name}: {told or 'nothing yet'} of {self._all()}{self._best()}{self._left()}"

    def __rich__(self) -> Group:
        shown = Table(expand=False)
        for column in ("trial", "seed", "step", self._plan.options.wanted[0].name, "settings"):
            shown.add_column(column, justify="left" if column == "settings" else "right")
        for trial in self._found.trials:
            if trial.state == "running":
                shown.add_row(*_cells(trial, self._plan))
        return Group(Text(self.line()), shown)

    def _all(self) -> int:
        """Runs of the whole search, as far as it is known."""
        options = self._plan.options
        again = options.seeds + (options.seeds - 1) * min(options.best, self._plan.trials) if options.seeds > 1 else 0
        return self._plan.trials + again + len(self._found.of_role("warmup"))

    def _best(self) -> str:
        objective = self._plan.options.wanted[0]
        best = better(objective, [t for t in self._found.of_role("search") if t.state == "finished"])
        return f"; best {objective.name} {best[0].value(objective.name):.2f} (trial {best[0].number})" if best else ""

    def _left(self) -> str:
        ended = len(_ended(self._found))
        spent = sum(trial.seconds for trial in self._found.trials) / 60
        told = f"; {spent:.1f} {self._found.search.clock} minutes spent"
        if ended <= self._ended:
            return told
        each = (time.monotonic() - self._began) / (ended - self._ended)
        seconds = each * (self._all() - ended)
        cost = spent / ended * (self._all() - ended)
        return f"{told}, about {cost:.1f} left; {int(seconds // 3600)}:{int(seconds // 60 % 60):02d} hours left"


@contextmanager
def shown(board: Board, stream: TextIO | None = None) -> Iterator[None]:
    """The board on the terminal while inside; elsewhere lines, at most one every 10 seconds and a last one."""
    out: TextIO = stream or sys.stderr
    if out.isatty():
        with Live(board, console=Console(file=out), refresh_per_second=2, transient=True):
            yield
        return
    import threading

    done = threading.Event()

    def tell() -> None:
        told = ""
        while not done.wait(EVERY):
            if board.line() != told:
                told = board.line()
                out.write(f"{told}\n")
                out.flush()

    thread = threading.Thread(target=tell, name="board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        out.write(f"{board.line()}\n")
        out.flush()


def summary(plan: Plan, found: Found) -> None:
    """The closing table: the contenders over their seeds, else the best trials; and the answer."""
    rows = _contenders(found) or _searched(plan, found)
    if rows:
        table(f"{plan.name}: {len(found.of_role('search'))} trials", rows, left=True)
    out = sys.stdout
    if found.conclusion is not None:
        out.write(f"{found.conclusion.sentence}\n")
    failed = [trial for trial in found.trials if trial.state == "failed"]
    for trial in failed:
        out.write(f"trial {trial.number} failed: {trial.why}\n")


def _contenders(found: Found) -> list[Mapping[str, object]]:
    if found.conclusion is None:
        return []
    name = found.search.objectives[0].name
    rows: list[Mapping[str, object]] = []
    for one in found.conclusion.contenders:
        between = "-" if one.low is None or one.high is None else f"[{one.low:+.2f}, {one.high:+.2f}]"
        rows.append(
            {
                "trial": one.number,
                name: f"{one.mean:.2f}",
                "seeds": len(one.seeds),
                "difference": f"{one.difference:+.2f}" if one.plain else "-",
                "95 % interval": between,
                "verdict": one.verdict,
                "settings": _settings(found.trials[one.number]),
            }
        )
    return rows


def _searched(plan: Plan, found: Found) -> list[Mapping[str, object]]:
    objective = plan.options.wanted[0]
    return [
        {
            "trial": trial.number,
            objective.name: f"{trial.value(objective.name):.2f}",
            "state": trial.state,
            "settings": _settings(trial),
        }
        for trial in better(objective, found.of_role("search"))[:SHOWN]
    ]


def _ended(found: Found) -> list[Trial]:
    return [trial for trial in found.trials if trial.state in ENDED]


def _cells(trial: Trial, plan: Plan) -> list[str]:
    value = trial.value(plan.options.wanted[0].name)
    step = f"{trial.last.step if trial.last else 0}/{plan.timing.steps}"
    return [str(trial.number), str(trial.seed), step, "-" if value is None else f"{value:.2f}", _settings(trial)]


def _settings(trial: Trial) -> str:
    """`alpha=0.0021 csa.heads=4`: keys without what all share."""
    if not trial.settings:
        return trial.role if trial.role == "plain" else "as the recipe"
    return " ".join(f"{_short(key)}={_told(value)}" for key, value in trial.settings.items())


def _short(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[2:]) if parts[0] == "distill" and len(parts) > 2 else key


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else to_text(value)
