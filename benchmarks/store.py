"""Rows of a long table: one file, written row by row and continued by the same command."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_sharding.files import write_atomically


@dataclass(frozen=True)
class Store:
    """The results, one file that is there whole or not at all."""

    path: Path
    settings: str
    """Fingerprint of what all rows share: rows of other settings are not compared."""

    def read(self) -> dict[str, Any]:
        """What is stored; ValueError where it was made with other settings."""
        if not self.path.exists():
            return {"settings": self.settings, "teacher": None, "rows": []}
        found = json.loads(self.path.read_text())
        if found["settings"] != self.settings:
            raise ValueError(
                f"{self.path.name} holds results of other settings ({found['settings']}, this script now has "
                f"{self.settings}); rename or delete it to begin anew"
            )
        return found

    def write(self, content: dict[str, Any]) -> None:
        """Replace all of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())

    def row(self, method: str, seed: int) -> dict[str, Any] | None:
        """This row, if it is done."""
        return next((r for r in self.read()["rows"] if (r["method"], r["seed"]) == (method, seed)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        content = self.read()
        self.write(content | {"rows": [*content["rows"], row]})


def fingerprint(settings: object) -> str:
    """Short name of settings."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
