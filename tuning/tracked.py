"""Runs as MLflow kept them, here or on a server: what they were set to, what came out, and their curves."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.grammar import ConfigError
from cluster.tracking import RUN_FILE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MACHINES = ("name", "seed", "storage", "tracking.", "resources.")
"""Settings that change nothing that is learnt, or, with the seed, luck alone."""
PREFIXES = ("val/", "student/", "")
"""A metric may be asked for without these."""
FINISHED = "FINISHED"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """One run."""

    run_id: str
    name: str
    status: str
    """MLflow's own word: FINISHED, RUNNING, KILLED, FAILED."""
    seed: int | None
    settings: Mapping[str, str]
    """Dotted key -> text, of what may change what is learnt."""
    metrics: Mapping[str, float]
    """The newest value of every metric."""

    def metric(self, name: str) -> float | None:
        """A metric by its name, with or without `val/` or `student/`; None, too, for COCO's -1: nothing to find."""
        value = next((self.metrics[p + name] for p in PREFIXES if p + name in self.metrics), None)
        return None if value == -1 else value


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """An MLflow store: a file, a database or a server."""

    uri: str

    def of_experiment(self, name: str) -> list[Tracked]:
        """Its runs that were evaluated, oldest first: neither searches' nor comparisons' own. ConfigError for none."""
        client = self._client()
        found = client.get_experiment_by_name(name)
        if found is None:
            known = [experiment.name for experiment in client.search_experiments()]
            raise ConfigError(f"{self.uri} has no experiment {name!r}{_hint(name, known)}")
        runs = [_tracked(run) for run in _pages(client, [found.experiment_id])]
        return [run for run in runs if any(key.startswith("val/") for key in run.metrics)]

    def named(self, asked: Sequence[str]) -> list[Tracked]:
        """The runs of these ids, names or folders, in this order, each once. ConfigError that tells of all that are
        none, or several."""
        from mlflow.exceptions import MlflowException

        client = self._client()
        wrong: list[str] = []
        told: dict[str, Tracked] = {}
        by_name: dict[str, list[Tracked]] | None = None
        for one in asked:
            remembered = Path(one) / RUN_FILE
            wanted = json.loads(remembered.read_text())["run_id"] if remembered.is_file() else one
            try:
                found = [_tracked(client.get_run(wanted))]
            except MlflowException:
                if by_name is None:
                    by_name = _by_name(client)
                found = by_name.get(one, [])
            if len(found) == 1:
                told[found[0].run_id] = found[0]
            elif found:
                ids = ", ".join(run.run_id for run in found)
                wrong.append(f"{one}: {len(found)} runs have this name; take an id: {ids}")
            else:
                wrong.append(f"{one}: neither an id, a name nor a folder of a run{_hint(one, by_name or [])}")
        if wrong:
            raise ConfigError("\n  ".join([f"{self.uri}: {len(wrong)} run(s) not found", *wrong]))
        return list(told.values())

    def curve(self, run: Tracked, metric: str) -> dict[int, float]:
        """Step -> value; what was logged last counts."""
        key = next((p + metric for p in PREFIXES if p + metric in run.metrics), None)
        history = self._client().get_metric_history(run.run_id, key) if key else []
        return {point.step: point.value for point in sorted(history, key=lambda p: (p.step, p.timestamp))}

    def _client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)


def tracker_of(uri: str | None, storage: Path) -> Tracker:
    """The store at `uri`, else the one below `storage`, as runs keep it. ConfigError where there is none."""
    if uri is not None:
        return Tracker(uri=uri)
    database = storage.resolve() / "mlflow.db"
    if not database.is_file():
        raise ConfigError(f"no runs in {database}; name their storage with --storage, or their server with --tracking")
    return Tracker(uri=f"sqlite:///{database}")


def _pages(client: "MlflowClient", experiments: list[str]) -> "Iterable[Run]":
    token: str | None = None
    while True:
        page = client.search_runs(experiments, order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _by_name(client: "MlflowClient") -> dict[str, list[Tracked]]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    told: dict[str, list[Tracked]] = {}
    for run in _pages(client, experiments):
        told.setdefault(run.info.run_name or run.info.run_id, []).append(_tracked(run))
    return told


def _tracked(run: "Run") -> Tracked:
    params = run.data.params
    lasting = {
        key: value
        for key, value in params.items()
        if not (key.startswith(MACHINES) and key != "resources.precision")
        and not (key.startswith("teachers.") and key.endswith(".stores"))
    }
    seed = params.get("seed", "")
    return Tracked(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        seed=int(seed) if seed.lstrip("-").isdigit() else None,
        settings=lasting,
        metrics=run.data.metrics,
    )


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
