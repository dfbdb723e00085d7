"""Which checkpoints are whole: every rank seals its part with the hashes of its files, and what is not as it was
sealed is never resumed from. A kill in the middle of a copy, a full disk and a power cut leave such ones behind."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.recovery.checkpoints import FACTS
from data_sharding.files import hash_of, stamped, unstamped

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a run's checkpoints, which it writes in place."""


def seal(folder: Path, rank: int) -> int:
    """Write down what this rank has put into `folder`, a folder of its own; its bytes."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    hashes = {path.name: hash_of(path) for path in files}
    _seal_of(folder, rank).write_bytes(stamped({"rank": rank, "files": hashes}))
    return sum(path.stat().st_size for path in folder.iterdir())


def steps_of(folder: Path) -> int | None:
    """The steps that a checkpoint says it has; None where it does not say."""
    try:
        return int(json.loads((folder / FACTS).read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty where it is whole."""
    try:
        workers = int(_checked(folder, 0)["workers"])
        for rank in range(1, workers):
            _checked(folder, rank)
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return ""


def newest(train: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the most steps in a run's folder `train`, and what is wrong with later ones."""
    wrong = []
    for folder in reversed(_checkpoints(train)):
        told = damage(folder)
        if not told:
            return folder, wrong
        wrong.append(f"{folder.name}: {told}")
    return None, wrong


def unsealed(train: Path) -> list[str]:
    """Checkpoints that Ray Train lists as finished and no rank has sealed: an earlier version of ours wrote them. What
    a kill has cut is not in the list yet, or has the seals of some ranks."""
    snapshot = train / SNAPSHOT
    listed = set(_listed(snapshot)) if snapshot.exists() else set()
    return [f.name for f in _checkpoints(train) if f.name in listed and not any(f.glob("sealed_*.json"))]


def tidy(train: Path, keep: int) -> list[str]:
    """Delete what nobody resumes from: checkpoints that are not whole and all but the newest `keep`; what was wrong
    with those that had more steps than the newest whole one. For the driver, while no worker runs. Ray Train refuses
    to go on where its list is torn or names one that is gone: it begins a new list then."""
    kept, wrong = 0, []
    for folder in reversed(_checkpoints(train)):
        told = damage(folder) if kept < keep else ""
        if kept < keep and not told:
            kept += 1
            continue
        shutil.rmtree(folder, ignore_errors=True)
        if not kept:
            wrong.append(f"{folder.name}: {told}")
    snapshot = train / SNAPSHOT
    if snapshot.exists() and not all((train / name).is_dir() for name in _listed(snapshot)):
        snapshot.unlink()
    return wrong


def _listed(snapshot: Path) -> Iterator[str]:
    """The folders that Ray Train's list names; one that is nowhere where it cannot be read."""
    try:
        found = json.loads(snapshot.read_text())
        results: list[Any] = [*found["checkpoint_results"], found["latest_checkpoint_result"]]
        yield from (result["checkpoint_dir_name"] for result in results if result is not None)
    except (ValueError, KeyError, TypeError):
        yield "unreadable"


def _checkpoints(train: Path) -> list[Path]:
    """By steps, then by name, which is the time of writing; what does not say its steps comes last."""
    return sorted((path for path in train.glob("checkpoint_*") if path.is_dir()), key=_age)


def _age(folder: Path) -> tuple[float, str]:
    steps = steps_of(folder)
    return (math.inf if steps is None else steps, folder.name)


def _checked(folder: Path, rank: int) -> dict[str, Any]:
    """The run's facts, where this rank's part is as it was sealed; ValueError or OSError where it is not."""
    for name, expected in unstamped(_seal_of(folder, rank).read_bytes())["files"].items():
        if hash_of(folder / name) != expected:
            raise ValueError(f"{name} is not as rank {rank} wrote it")
    return json.loads((folder / FACTS).read_text())


def _seal_of(folder: Path, rank: int) -> Path:
    return folder / f"sealed_{rank:05d}.json"
