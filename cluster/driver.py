"""The driver's side of Ray: one start for every verb, what a machine can hold, and errors in the user's words."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError
from cluster.places import job_environment
from cluster.ray_process import set_up_worker
from cluster.tracking import CLIENT_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    # Reports are polled by the controller: the default of 2 s is what every checkpoint would wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # A tracking server that is away: seconds, where MLflow would try for minutes inside one call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
LOCAL_ENVIRONMENT = {
    # Else the core tells a person at the terminal of its actors' reference counts. (Of a running cluster's core it
    # would tell that it was told so.)
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Nobody takes this machine's only node away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
WORKER_MEMORY = {
    # glibc gives large blocks back at once and every step faults its activations in again: on a CPU more than half of a
    # step (MobileNetV2 forward and backward at 256 px: 1.46 s as it is, 0.68 s with these). Freed memory stays with the
    # process instead; in one arena, as those of other threads than the main one, where Ray trains, are given back all
    # the same (1.57 s with the other three settings alone).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}


@contextmanager
def ray_started() -> Iterator[None]:
    """Ray for the time inside: the cluster this process was submitted to, else a local one on loopback."""
    import ray

    if ray.is_initialized():  # an outer command started it
        yield
        return
    address = cluster_address()
    variables = ENVIRONMENT | (LOCAL_ENVIRONMENT if address == "local" else {})
    os.environ.update({key: value for key, value in variables.items() if key not in os.environ})
    ray.init(
        address=address,
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=True,
        runtime_env=_runtime_env(job_environment()),
    )
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address() -> str:
    """RAY_ADDRESS, which the job manager sets; never a cluster that merely happens to run on this machine. A web
    address is the job server's, where `ray job submit` sends to: not one to connect to."""
    given = os.environ.get("RAY_ADDRESS", "")
    return "local" if not given or given.startswith("http") else given


def _runtime_env(job: Mapping[str, Any]) -> dict[str, Any]:
    """What workers get beside the job's own environment, whose settings win (Ray refuses the same one twice). The
    code itself travels as the job's working directory; a local Ray and nodes with a common disk find it by path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"} | CLIENT_ENVIRONMENT | WORKER_MEMORY
    own: dict[str, Any] = {
        "env_vars": {name: value for name, value in variables.items() if name not in job.get("env_vars", {})},
        "worker_process_setup_hook": set_up_worker,
    }
    return {name: value for name, value in own.items() if name == "env_vars" or name not in job}


def require_resources(workers: int, threads: int, gpu: bool) -> None:
    """Raise ConfigError where the cluster can never hold the workers: Ray would wait for ever."""
    import ray

    total = ray.cluster_resources()
    for kind, needed in (("CPU", workers * threads), ("GPU", workers if gpu else 0)):
        if total.get(kind, 0) < needed:
            raise ConfigError(
                f"resources: {workers} worker(s) need {needed} {kind}s, the cluster has {total.get(kind, 0):g}; lower "
                "resources.workers or resources.threads, or add nodes"
            )


def wants_gpu(asked: bool | None, workers: int) -> bool:
    """Whether each worker takes a GPU; `None` asks the cluster."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= workers if asked is None else asked


def users_error(error: BaseException) -> BaseException:
    """The error that a worker raised on purpose, out of Ray's wrappings; the error itself where there is none."""
    seen: list[BaseException] = [error]
    for wrapped in seen:
        failures: Mapping[int, BaseException] = getattr(wrapped, "worker_failures", {}) or {}
        inner = [
            *failures.values(),
            getattr(wrapped, "cause", None),
            getattr(wrapped, "_base_exc", None),
            wrapped.__cause__,
        ]
        seen.extend(e for e in inner if isinstance(e, BaseException) and e not in seen)
        if isinstance(wrapped, ConfigError | FloatingPointError):
            return wrapped
    return error


@contextmanager
def follow(
    path: Path, tell: Any, total: int, every: float = 0.5, look: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Tell how far a run is, from the metrics that rank 0 appends to `path`, while inside; `look` as often."""
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, tell, total, every, done, look), name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _follow(path: Path, tell: Any, total: int, every: float, done: threading.Event, look: Callable[[], None]) -> None:
    import json

    position, newest = 0, {}
    while True:
        last = done.is_set()
        look()
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                lines = [line for line in file if line.endswith(b"\n")]
                position += sum(map(len, lines))
            for line in lines:
                row = json.loads(line)
                newest = newest | row["m"]
                step = row["s"] + (1 if "loss/total" in row["m"] else 0)
                tell(min(step, total), total, _note(newest))
        if last:
            return
        time.sleep(every)


def _note(metrics: Mapping[str, float]) -> str:
    words = [f"loss {metrics['loss/total']:.3f}"] if "loss/total" in metrics else []
    words += [f"AP {metrics['val/AP']:.1f}"] if "val/AP" in metrics else []
    return "  ".join(words)


def say(text: str) -> None:
    """A line to the person at the terminal."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
