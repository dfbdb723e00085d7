"""What a search has found so far: one JSON file, written anew after every event and continued by the same command.

`STORAGE/NAME_search/search.json`:

    {"version": 1,
     "search": {...},        the fields of `Search`, written once
     "trials": [{...}, ...], the fields of `Trial`, by number from 0; `curve` is a list of {step, values, seconds}
     "conclusion": {...}}    the fields of `Conclusion`; null until seeds were compared
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError
from data_sharding.files import write_atomically
from tuning.trials import Conclusion, Contender, Found, Objective, Point, Search, Trial

VERSION = 1
FILE = "search.json"


@dataclass(frozen=True)
class TrialStore:
    """The file, which is there whole or not at all. One process writes it."""

    path: Path

    def exists(self) -> bool:
        """Whether a search was begun here."""
        return self.path.exists()

    def read(self) -> Found:
        """What is stored. Raises ConfigError for a file of another version, FileNotFoundError for none."""
        tree = json.loads(self.path.read_text())
        if tree.get("version") != VERSION:
            raise ConfigError(
                f"{self.path} is of version {tree.get('version')}, this is {VERSION}; choose a new name for the search"
            )
        return from_tree(tree)

    def write(self, found: Found) -> None:
        """Replace what is stored."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(to_tree(found), indent=1) + "\n").encode())

    def put(self, trial: Trial) -> Found:
        """Store a new trial, or a new state of one; everything as it is then."""
        found = self.read()
        if trial.number > len(found.trials):
            raise ValueError(f"{self.path}: trial {trial.number} follows on {len(found.trials)} trials")
        trials = (*found.trials[: trial.number], trial, *found.trials[trial.number + 1 :])
        found = replace(found, trials=trials)
        self.write(found)
        return found


def store_of(folder: Path) -> TrialStore:
    """The store of the search whose folder this is."""
    return TrialStore(folder / FILE)


def to_tree(found: Found) -> dict[str, Any]:
    """Plain values for JSON."""
    return {"version": VERSION, **asdict(found)}


def from_tree(tree: Mapping[str, Any]) -> Found:
    """The inverse of `to_tree`."""
    search, conclusion = dict(tree["search"]), tree["conclusion"]
    search["objectives"] = tuple(Objective(**one) for one in search["objectives"])
    return Found(
        search=Search(**search),
        trials=tuple(
            Trial(**one | {"curve": tuple(Point(**point) for point in one["curve"])}) for one in tree["trials"]
        ),
        conclusion=None if conclusion is None else _conclusion(conclusion),
    )


def _conclusion(tree: Mapping[str, Any]) -> Conclusion:
    lists = ("seeds", "values", "plain")
    contenders = tuple(Contender(**one | {name: tuple(one[name]) for name in lists}) for one in tree["contenders"])
    return Conclusion(**{**tree, "contenders": contenders})
