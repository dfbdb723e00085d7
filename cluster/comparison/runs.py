"""A comparison's runs one after another, in rounds of seeds; what is done stays done, whatever was killed."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import results
from cluster.comparison.plan import PLAIN, Plan, Row
from cluster.comparison.store import Store
from cluster.config import RunConfig, check, config_hash
from cluster.grammar import ConfigError

VIEWS, TIME = "fresh_views", "equal_time"
"""Facts that are settled once, so that all seeds of a row are of one budget."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What is to be trained, what is done, and who trains."""

    plan: Plan
    store: Store
    train: Callable[[RunConfig, Row], dict[str, Any]]
    """Trains a run to its end, or finds it finished; its result."""
    fresh_views: Callable[[], int]
    """Views per image with which none is seen twice; None is asked before it is needed."""
    stores: Mapping[str, Any]
    """Dotted settings of the rows with a teacher: what their common cache holds."""
    say: Callable[[str], None]

    def left(self) -> list[tuple[Row, int]]:
        """What is not done yet, in order."""
        done = {(run["row"], run["seed"]) for run in self.store.runs()}
        return [(row, seed) for row, seed in self.plan.rounds() if (row.name, seed) not in done]

    def go(self, published: Callable[[], None]) -> dict[str, str]:
        """Train what is left; `published` is called whenever a round ends. What failed, by row, and why.

        A row that fails does not hold up the others, and the same command tries it again; without the plain student
        there is nothing to compare with, so that its failure is raised.
        """
        failed: dict[str, str] = {}
        total = len(self.plan.rows) * self.plan.seeds
        previous = None
        for row, seed in self.left():
            if previous is not None and seed != previous:
                published()
            previous = seed
            if row.name in failed:
                continue
            try:
                self._settle(row, seed)
                config = config_of(self.plan, row, seed, self.store.read()["facts"], self.stores)
                self.say(f"[{len(self.store.runs()) + 1}/{total}] {row.name}, seed {seed}{self._time_left()}")
                result = self.train(config, row)
            except (ConfigError, FloatingPointError) as error:
                if row.kind == "plain":
                    raise
                failed[row.name] = str(error)
                self.say(f"{row.name} failed: {error}")
                continue
            self.store.add(numbers(config, row, result))
        published()
        return failed

    def _settle(self, row: Row, seed: int) -> None:
        """Decide what only now can be known of a row."""
        if row.kind == "fresh":
            self.store.settle(VIEWS, self.fresh_views())
        elif row.kind == "equal_time":
            self.store.settle(TIME, self._longest(row, seed))

    def _longest(self, row: Row, seed: int) -> dict[str, Any]:
        """As many steps as the plain student does in the time of the slowest method, by this seed's runs."""
        runs = {run["row"]: run for run in self.store.runs() if run["seed"] == seed}
        methods = [other.name for other in self.plan.rows if other.kind == "method" and other.name in runs]
        if PLAIN not in runs or not methods:
            raise ConfigError(f"no method is done with seed {seed}, so that there is no time to equal")
        slowest = max(methods, key=lambda name: seconds(runs[name]))
        longer = max(1.0, seconds(runs[slowest]) / seconds(runs[PLAIN]))
        return {"steps": round(row.tree["optim"]["steps"] * longer), "row": slowest, "times": longer}

    def _time_left(self) -> str:
        minutes = [run["minutes"] for run in self.store.runs()]
        if not minutes:
            return ""
        left = statistics.mean(minutes) * len(self.left())
        return f" (about {int(left // 60)}:{int(left % 60):02d} hours left)"


def config_of(
    plan: Plan, row: Row, seed: int, facts: Mapping[str, Any], stores: Mapping[str, Any] | None = None
) -> RunConfig:
    """The checked recipe of one run, with the facts settled so far. `stores` changes nothing that is learnt."""
    changes: dict[str, Any] = {}
    if row.kind == "method":
        changes = dict(stores or {})
    elif row.kind == "fresh" and VIEWS in facts:
        changes = {"views.count": facts[VIEWS]}
    elif row.kind == "equal_time" and TIME in facts:
        changes = {"optim.steps": facts[TIME]["steps"]}
    return check(plan.run(row, seed, changes), f"row {row.name}")


def require_same_settings(plan: Plan, store: Store) -> None:
    """ConfigError that names every stored run which the plan would now train with other settings."""
    facts = store.read()["facts"]
    told: list[str] = []
    for row, seed in plan.rounds():
        run = store.find(row.name, seed)
        if run is not None and config_hash(config_of(plan, row, seed, facts)) != run["settings"]:
            told.append(f"{row.name}, seed {seed}: {run['run']}")
    if told:
        raise ConfigError(
            f"{store.path} holds {len(told)} run(s) of other settings than now; set them back, or choose a new name "
            "for the recipe or the row:\n  " + "\n  ".join(told)
        )


def seconds(run: Mapping[str, Any]) -> float:
    """What a run's training steps took: on a GPU by the clock, else of its processors, which other programs share."""
    return run["seconds"] if run["device"] == "cuda" else run["cpu_seconds"]


def numbers(config: RunConfig, row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a finished run."""
    logged = list(_logged(Path(config.storage) / config.name / results.METRICS))
    steps = config.optim.steps
    return {
        "row": row.name,
        "kind": row.kind,
        "seed": config.seed,
        "settings": config_hash(config),
        "run": config.name,
        "run_id": result["run_id"],
        "metrics": result["metrics"],
        "steps": steps,
        # A median: the first steps, and those that waited for other programs, say nothing about the method.
        "seconds": steps * statistics.median(entry["time/step_s"] for entry in logged),
        "cpu_seconds": steps * statistics.median(entry["time/cpu_s"] for entry in logged),
        "memory_bytes": result["memory_bytes"],
        "device": result["device"],
        "minutes": result["minutes"],
        "shares": _shares(logged[len(logged) // 2 :]),
    }


def _logged(path: Path) -> Iterator[dict[str, float]]:
    """The metrics of every training step."""
    with path.open() as file:
        for line in file:
            entry = json.loads(line)["m"]
            if "time/step_s" in entry:
                yield entry


def _shares(logged: list[dict[str, float]]) -> dict[str, float]:
    """The mean share of every distillation term in the task loss."""
    names = sorted({name for entry in logged for name in entry if name.startswith("share/")})
    return {
        name.removeprefix("share/"): statistics.mean(entry[name] for entry in logged if name in entry) for name in names
    }
