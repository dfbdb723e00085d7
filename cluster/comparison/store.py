"""What a comparison has found so far: one file, written anew after every run and continued by the same command."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError
from data_sharding.files import write_atomically

VERSION = 1


@dataclass(frozen=True)
class Store:
    """The file, which is there whole or not at all. A run is a dict with `row`, `seed`, `settings` and its numbers."""

    path: Path

    def read(self) -> dict[str, Any]:
        """What is stored: `runs`, `facts` that were settled once, and the `teachers`."""
        if not self.path.exists():
            return {"version": VERSION, "teachers": {}, "facts": {}, "runs": []}
        found = json.loads(self.path.read_text())
        if found.get("version") != VERSION:
            raise ConfigError(
                f"{self.path} is of version {found.get('version')}, this is {VERSION}; choose a new name for the recipe"
            )
        return found

    def runs(self) -> list[dict[str, Any]]:
        """The finished runs, in the order in which they were done."""
        return self.read()["runs"]

    def find(self, row: str, seed: int) -> dict[str, Any] | None:
        """This run, if it is done."""
        return next((run for run in self.runs() if (run["row"], run["seed"]) == (row, seed)), None)

    def add(self, run: dict[str, Any]) -> None:
        """Append a run; a row and a seed are stored once."""
        if self.find(run["row"], run["seed"]) is not None:
            raise ValueError(f"{self.path}: {run['row']}, seed {run['seed']} is stored already")
        content = self.read()
        self._write(content | {"runs": [*content["runs"], run]})

    def settle(self, name: str, value: Any) -> Any:
        """The fact `name`: as it was settled before, else `value` from now on."""
        content = self.read()
        if name not in content["facts"]:
            self._write(content | {"facts": content["facts"] | {name: value}})
        return content["facts"].get(name, value)

    def require_teachers(self, teachers: dict[str, str]) -> None:
        """Remember the teachers (name -> SHA-256 of the weights); ConfigError where the rows have other ones."""
        content = self.read()
        if not content["teachers"]:
            self._write(content | {"teachers": teachers})
        elif content["teachers"] != teachers:
            told = [
                f"{name}: {content['teachers'].get(name, 'none')[:12]} -> {teachers.get(name, 'none')[:12]}"
                for name in sorted({*content["teachers"], *teachers})
            ]
            raise ConfigError(
                f"{self.path} holds runs of other teachers than the recipe now names ({'; '.join(told)}); put the "
                "teacher back, or choose a new name for the recipe"
            )

    def _write(self, content: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())
