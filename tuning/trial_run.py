"""One trial inside its Ray Tune process: `cluster.training.train`, and what its metrics file tells of it meanwhile."""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.grammar import ConfigError

EVERY = 0.2
"""Seconds between two looks at the metrics file."""
KEPT = ("parameters", "ms_per_image", "gflops", "memory_bytes")
"""Facts of a finished student, beside the numbers of its last evaluation."""
CLOCKS = {"processor": "time/cpu_s", "wall": "time/step_s"}


class Curve:
    """The evaluations in a run's metrics file, from its first line on, each told once."""

    def __init__(self, path: Path, wanted: tuple[str, ...], clock: str, before: float = 0.0) -> None:
        """`wanted`: the objectives; `clock`: `processor` or `wall`; `before`: seconds of the steps that another run did
        for this one."""
        self._path, self._wanted, self._clock = path, wanted, CLOCKS[clock]
        self._before, self._position = before, 0
        self._spent: dict[int, float] = {}

    def news(self) -> Iterator[dict[str, Any]]:
        """Points that were written since the last call: step, values, seconds."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            lines = [line for line in file if line.endswith(b"\n")]
        self._position += sum(map(len, lines))
        for line in lines:
            row = json.loads(line)
            if self._clock in row["m"]:
                self._spent[row["s"]] = row["m"][self._clock]
            values = {name: row["m"][f"val/{name}"] for name in self._wanted if f"val/{name}" in row["m"]}
            if values:
                # COCO's -1: nothing was there to be found.
                told = {name: value for name, value in values.items() if value >= 0}
                yield {"step": row["s"], "values": told, "seconds": self.seconds(row["s"])}

    def seconds(self, step: int) -> float:
        """Spent on the steps before `step`."""
        return self._before + sum(value for number, value in self._spent.items() if number < step)


def run_trial(handed: Mapping[str, Any]) -> None:
    """Ray Tune's entry point: `job` as JSON. Tells points as they come, and last the result or what refused it."""
    from ray import tune

    from cluster import results
    from cluster.config import check
    from cluster.training import train

    given = json.loads(handed["job"])

    def tell(**news: Any) -> None:
        # As text: Tune hands nested results to schedulers with their keys run together.
        tune.report({"number": given["number"], "news": json.dumps(news)})

    config = check(given["tree"], source=given["run"])
    folder = Path(config.storage) / config.name
    curve = Curve(folder / results.METRICS, tuple(given["wanted"]), given["clock"], given["before"])
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = train(config, given["tags"])
        except BaseException as error:
            outcome["error"] = error

    # Tune hears of this thread alone; Ray Train's call blocks, so that it has one of its own.
    thread = threading.Thread(target=work, name="train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(EVERY)
        for point in curve.news():
            if point["step"] < config.optim.steps:
                tell(point=point)
    list(curve.news())
    error = outcome.get("error")
    if isinstance(error, ConfigError | FloatingPointError):
        tell(refused=str(error))
    elif error is not None:
        raise error
    elif results.RESTED in outcome["result"]:
        rested = outcome["result"]
        last = {"step": rested[results.RESTED], "values": {}, "seconds": curve.seconds(rested[results.RESTED])}
        told = {"last": last, "checkpoint": rested[results.CHECKPOINT], "run_id": rested["run_id"]}
        tell(rested=told)
    else:
        tell(end=ended(outcome["result"], curve.seconds(config.optim.steps), config.optim.steps, given["wanted"]))


def ended(result: Mapping[str, Any], seconds: float, steps: int, wanted: list[str]) -> dict[str, Any]:
    """What is kept of a finished run: its last point, its facts, its minutes and its MLflow run."""
    facts = {**result["metrics"], **{name: result[name] for name in KEPT if result.get(name) is not None}}
    known = {name: float(value) for name, value in facts.items() if value >= 0}
    values = {name: known[name] for name in wanted if name in known}
    return {
        "last": {"step": steps, "values": values, "seconds": seconds},
        "facts": known,
        "minutes": float(result["minutes"]),
        "run_id": result["run_id"],
    }
