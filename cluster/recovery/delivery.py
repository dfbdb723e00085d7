"""What a finished run still owes its record in MLflow: rows, files, the end. Where the server is away all of it stays
in the run's folder, and the same command again hands it over."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from cluster import results
from cluster.metric_log import MetricLog
from cluster.tracking import RUN_FILE, RunHandle
from data_sharding.files import write_atomically

FILES = (results.SAMPLES, results.STUDENT, results.DETECTIONS)
PATIENCE = 60.0
"""Seconds that a command waits for the server at its end."""
PAUSE = 2.0


def deliver(folder: Path, handle: RunHandle, say: Callable[[str], None], patience: float = PATIENCE) -> bool:
    """Hand over what is left of the run in `folder`, trying for `patience` seconds. False, and a line, where the
    server stays away."""
    until = time.monotonic() + patience
    while (error := _try(folder, handle, max(PAUSE, until - time.monotonic()))) is not None:
        if time.monotonic() >= until:
            text = str(error).splitlines()[0][:200]
            say(
                f"{folder.name}: {handle.uri} does not answer ({text}); metrics and files stay in {folder}; the same "
                "command again hands them over"
            )
            return False
        time.sleep(PAUSE)
    _mark(folder, handle)
    return True


def delivered(folder: Path) -> bool:
    """Whether the record of the run is complete."""
    path = folder / RUN_FILE
    return path.exists() and bool(json.loads(path.read_text()).get("delivered"))


def _try(folder: Path, handle: RunHandle, patience: float) -> Exception | None:
    """Why it did not work; None when all is there."""
    log = MetricLog(folder / results.METRICS, handle.ship)
    if not log.close(timeout=patience):
        return log.failure or TimeoutError("no answer")
    try:
        for name in FILES:
            if (folder / name).exists():
                handle.add_file(folder / name)
        handle.close("FINISHED")
    except Exception as error:
        # Whatever the server throws, the run is finished and the rest can wait.
        return error
    return None


def _mark(folder: Path, handle: RunHandle) -> None:
    content = {"run_id": handle.run_id, "uri": handle.uri, "delivered": True}
    write_atomically(folder / RUN_FILE, json.dumps(content).encode())
