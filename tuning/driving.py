"""A search's trials on Ray Tune: its searcher and its scheduler are the desk's words in Tune's mouth.

Tune places the trials' processes on the head node, where they take nothing: their workers are Ray Train's own. The
desk's store is what a killed search is continued from, so that Tune keeps nothing of its own that is read again.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cluster.driver import say, users_error
from tuning.desk import DONE, WAIT, Desk
from tuning.stopping import Never
from tuning.trial_run import run_trial
from tuning.trials import Point, Trial

PLACE = {"node:__internal_head__": 0.001}
"""A trial's own process: on the head, beside whatever else runs there. With a CPU of its own it would wait for one that
its workers never leave."""
QUIET = {
    # Its loggers write files that nobody reads.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Its newer reporter prints a box whatever its verbosity is; the older one is silent when told so.
    "RAY_AIR_NEW_OUTPUT": "0",
    # The desk tells of trials that break off, in a line.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # Its own handler of Ctrl-C would come back from `fit` as from a search that has ended.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
MOST_LETTERS = 300
"""Of an error, as a person is told of it."""
RESTARTS = 2
"""How often a trial whose process died is begun again by the same driver."""


class DeskSearcher(Searcher):
    """Hands Tune what the desk says is next."""

    def __init__(self, desk: Desk, job: Callable[[Trial], Mapping[str, Any]]) -> None:
        super().__init__(metric="number", mode="max")
        self._desk, self._job = desk, job

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        found = self._desk.next()
        if found == DONE:
            return Searcher.FINISHED
        return None if found == WAIT else {"number": found.number, "job": json.dumps(self._job(found))}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the desk's store is what a search is continued from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The desk hears of it by other ways."""


class DeskScheduler(FIFOScheduler):
    """Passes on what trials report, and ends those that the desk stops."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def on_trial_result(self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]) -> str:
        news = json.loads(result["news"])
        if "point" not in news:
            return TrialScheduler.CONTINUE
        why = self._desk.heard(result["number"], Point(**news["point"]))
        return TrialScheduler.STOP if why is not None else TrialScheduler.CONTINUE


class DeskCallback(Callback):
    """Tells the desk how trials end."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        number, news = result["number"], json.loads(result["news"])
        if "refused" in news:
            self._desk.refused(number, news["refused"])
        elif "rested" in news:
            rest = news["rested"]
            self._desk.rested(number, Point(**rest["last"]), rest["checkpoint"], rest["run_id"])
        elif "end" in news:
            end = news["end"]
            self._desk.finished(number, Point(**end["last"]), end["facts"], end["minutes"], end["run_id"])

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._desk.gone(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = trial.get_error()
        self._desk.gone(trial.config["number"], _told(error))

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        number = trial.config["number"]
        self._desk.restarted(number)
        say(f"trial {number} broke off and goes on from its last checkpoint: {_told(trial.get_error())}")


def _told(error: BaseException | None) -> str:
    """An error in a line: its own words stand last."""
    lines = str(error and users_error(error)).strip().splitlines()
    return lines[-1][:MOST_LETTERS] if lines else "nothing is known of it"


def drive(desk: Desk, job: Callable[[Trial], Mapping[str, Any]]) -> None:
    """Run trials until the desk has no more. Ray must be started; `job` is what `run_trial` gets."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    # A process that has ended its trial begins the next one without importing all again; one whose trial was stopped
    # still trains in a thread of its own, and is ended.
    reuse = isinstance(desk.stopping, Never)
    with tempfile.TemporaryDirectory(prefix="minnow_tune_") as notes:
        tune.Tuner(
            tune.with_resources(run_trial, PLACE),
            tune_config=tune.TuneConfig(
                search_alg=DeskSearcher(desk, job), scheduler=DeskScheduler(desk), num_samples=-1, reuse_actors=reuse
            ),
            run_config=RunConfig(
                name="trials",
                storage_path=notes,
                verbose=0,
                callbacks=[DeskCallback(desk)],
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        ).fit()
