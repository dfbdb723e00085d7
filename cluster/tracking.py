"""The record of a run in MLflow: opened once by the driver, written to by rank 0, continued after a restart.

MLflow is imported inside functions: its import takes longer than checking a recipe.
"""

import fcntl
import json
import logging
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from cluster.grammar import ConfigError
from cluster.metric_log import Row

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from cluster.config import RunConfig

RUN_FILE = "mlflow_run.json"
ROWS_PER_CALL = 1000
"""MLflow's limit for one call."""
CLIENT_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""For the processes that ship metrics: fail soon and try again later, instead of minutes inside one call."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the record of the run is kept."""

    uri: str | None = None
    """Any MLflow tracking URI, without a password in it; null: an SQLite file below `storage`, which must then be a
    folder."""
    experiment: str = "minnow"
    ranks_every: int = 20
    """Steps over which every worker's times and memory are averaged before all are told; 0: rank 0's alone."""

    def __post_init__(self) -> None:
        if self.ranks_every < 0:
            raise ValueError(f"ranks_every must be >= 0, got {self.ranks_every}")
        if self.uri is not None and _holds_password(self.uri):
            raise ValueError(
                f"uri={urlsplit(self.uri).scheme}://... holds a password, which would end up in logs, parameters and "
                "files; take it out and give it by the environment (MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN for a server, PGPASSWORD for PostgreSQL)"
            )


def _holds_password(uri: str) -> bool:
    parts = urlsplit(uri)
    words = ("password", "passwd", "token", "secret")
    return ":" in parts.netloc.rpartition("@")[0] or any(word in parts.query.lower() for word in words)


@dataclass(frozen=True)
class RunHandle:
    """One MLflow run, by name: travels to workers, opens its client where it is used."""

    run_id: str
    uri: str

    def ship(self, rows: list[Row]) -> None:
        """Store rows; the same rows again change nothing."""
        from mlflow.entities import Metric

        client = _client(self.uri)
        metrics = [Metric(row.key, row.value, row.time_ms, row.step) for row in rows]
        for start in range(0, len(metrics), ROWS_PER_CALL):
            client.log_batch(self.run_id, metrics=metrics[start : start + ROWS_PER_CALL], synchronous=True)

    def add_file(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder, beside the run (below `folder`)."""
        _client(self.uri).log_artifact(self.run_id, str(path), folder)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        client = _client(self.uri)
        for key, value in tags.items():
            client.set_tag(self.run_id, key, value)

    def tell(self, status: Status) -> None:
        """`close`, where the server answers: what is being told already matters more."""
        with suppress(Exception):
            self.close(status)

    def close(self, status: Status) -> None:
        """Tell how the run ended."""
        _client(self.uri).set_terminated(self.run_id, status)

    @contextmanager
    def machine_metrics(self, node: str, every: int = 10) -> Iterator[None]:
        """While inside, the load of this machine (CPU, memory, disk, network, GPU) is part of the run, sampled
        every so many seconds."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            self.run_id, sampling_interval=every, resume_logging=True, node_id=node, tracking_uri=self.uri
        )
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


def open_run(config: "RunConfig", storage: Path | str, tags: Mapping[str, str] | None = None) -> RunHandle:
    """The run of `config`: the one that its folder (`storage`/name) remembers, else a new one.

    For the driver alone. `tags` may say what only the driver knows: the teacher's and the data set's hashes, the
    cache's key. Recipe, locked requirements, git commit and the recipe's hash are added here.
    """
    uri, artifacts, folder = _places(config, storage)
    # A fresh SQLite database opened by several processes at once dies in its own migrations.
    with _locked(folder.parent / "mlflow.lock"), _answering(uri):
        client = _client(uri)
        experiment = _experiment(client, config.tracking.experiment, artifacts)
        handle = _continued(client, uri, folder) or _started(client, uri, experiment, config.name, folder)
        _describe(client, handle, config, tags or {})
    return handle


class TrackerAway(ConfigError):
    """The tracking server does not answer."""


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """TrackerAway where the server does not answer at all."""
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except MlflowException as error:
        if isinstance(error, RestException) or "://" not in uri or not uri.startswith("http"):
            raise
        raise TrackerAway(
            f"tracking.uri: {uri} does not answer; start the server, or leave tracking.uri out"
        ) from error


def remembered(config: "RunConfig", storage: Path | str) -> RunHandle | None:
    """The run that the folder of `config` remembers, without asking the server; None where it was never begun."""
    uri, _, folder = _places(config, storage)
    path = folder / RUN_FILE
    return RunHandle(json.loads(path.read_text())["run_id"], uri) if path.exists() else None


def _places(config: "RunConfig", storage: Path | str) -> tuple[str, str | None, Path]:
    """Tracking URI, folder for artifacts (None: the server's business) and the run's own folder."""
    if "://" in str(storage):
        raise ConfigError(f"storage: the record of a run needs a folder to remember its id in, got {storage}")
    root = Path(storage).resolve()
    (root / config.name).mkdir(parents=True, exist_ok=True)
    if config.tracking.uri is not None:
        return config.tracking.uri, None, root / config.name
    return f"sqlite:///{root / 'mlflow.db'}", (root / "mlflow_artifacts").as_uri(), root / config.name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    # It tells of every table that it creates and of every monitor that it starts.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    # MLflow opens what it takes for a project of language models on another page.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    return client.create_experiment(name, artifact_location=artifacts, tags=kind)


def _continued(client: "MlflowClient", uri: str, folder: Path) -> RunHandle | None:
    from mlflow.exceptions import MlflowException

    remembered = folder / RUN_FILE
    if not remembered.exists():
        return None
    run_id = json.loads(remembered.read_text())["run_id"]
    try:
        client.get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"{remembered} names the MLflow run {run_id}, which {uri} cannot show ({error.message}); set tracking.uri "
            "to where the run began, or delete this file to begin a new record"
        ) from None
    client.update_run(run_id, status="RUNNING")
    return RunHandle(run_id, uri)


def _started(client: "MlflowClient", uri: str, experiment: str, name: str, folder: Path) -> RunHandle:
    handle = RunHandle(client.create_run(experiment, run_name=name).info.run_id, uri)
    fresh = folder / f"{RUN_FILE}.new"
    fresh.write_text(json.dumps({"run_id": handle.run_id, "uri": uri}))
    fresh.replace(folder / RUN_FILE)
    return handle


def _describe(client: "MlflowClient", handle: RunHandle, config: "RunConfig", tags: Mapping[str, str]) -> None:
    """Parameters, tags and files that tell how to do the run again. Safe to repeat."""
    from mlflow.entities import Param

    from cluster.config import config_hash, to_params, to_recipe

    logged = client.get_run(handle.run_id).data.params
    params = to_params(config)
    new = [Param(key, value) for key, value in params.items() if key not in logged]
    client.log_batch(handle.run_id, params=new, synchronous=True)
    # MLflow's parameters never change; what a restart may change (machines, tracking) is told as tags.
    changed = {f"restarted.{key}": value for key, value in params.items() if logged.get(key, value) != value}
    handle.tag({"config_hash": config_hash(config), **git_state(), **changed, **tags})
    client.log_text(handle.run_id, to_recipe(config), "recipe.yaml")
    lock = _project() / "requirements.lock"
    if lock.exists():
        handle.add_file(lock)


def git_state() -> dict[str, Any]:
    """The project's commit and whether files differ from it; `unknown` where the code came without its history."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=_project(), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    dirty = "unknown" if changes is None else str(bool(changes)).lower()
    return {"git.commit": commit or "unknown", "git.dirty": dirty}


def _project() -> Path:
    return Path(__file__).resolve().parents[1]
