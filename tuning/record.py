"""A search in MLflow: a parent run, a child per trial, the best child marked, files beside the parent."""

import time
from dataclasses import dataclass, replace

from cluster.config import RunConfig
from cluster.metric_log import Row
from cluster.tracking import RunHandle, open_run
from tuning.plan import Plan
from tuning.trial_store import TrialStore
from tuning.trials import Found, Trial, better

PARENT = "mlflow.parentRunId"
BEST_TAG = "search.best"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The parent run."""

    plan: Plan
    store: TrialStore
    handle: RunHandle

    @staticmethod
    def opened(config: RunConfig, plan: Plan, store: TrialStore) -> "Record":
        """The search's run: new, or the one that it had. Its id goes into the store."""
        tags = {"search.space": plan.space.name, "search.searcher": plan.options.searcher}
        handle = open_run(replace(config, name=plan.folder.name), plan.storage, tags)
        found = store.read()
        store.write(replace(found, search=replace(found.search, parent_run=handle.run_id, tracking=handle.uri)))
        return Record(plan=plan, store=store, handle=handle)

    def running(self) -> None:
        """Say which keys are searched."""
        self.handle.tag({"search.keys": ", ".join(key.name for key in self.plan.space.keys)[:5000]})

    def tags(self, trial: Trial) -> dict[str, str]:
        """Of a child: whose it is, and which."""
        more = {} if trial.of is None else {"search.of": str(trial.of)}
        return {PARENT: self.handle.run_id, "search.trial": str(trial.number), "search.role": trial.role, **more}

    def close(self, found: Found, *, broken: bool) -> None:
        """Tell how the search ended: stopped children, the best one, curves and files of the parent."""
        for trial in found.trials:
            if trial.run_id is not None and trial.state in ("stopped", "failed"):
                child = RunHandle(trial.run_id, self.handle.uri)
                child.tag({f"search.{trial.state}": trial.why[:5000]})
                child.close("KILLED" if trial.state == "stopped" else "FAILED")
        self.handle.ship(_rows(found))
        if found.conclusion is not None:
            self._mark(found, found.conclusion.best)
        for path in sorted(self.plan.folder.iterdir()):
            if path.name == self.store.path.name or path.suffix in (".yaml", ".html", ".png"):
                self.handle.add_file(path)
        self.handle.close("FAILED" if broken else "FINISHED")

    def stopped(self, error: BaseException) -> None:
        """Tell that the driver was stopped, or failed."""
        self.handle.close("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")

    def _mark(self, found: Found, best: int) -> None:
        assert found.conclusion is not None
        told = {"search.conclusion": found.conclusion.sentence, "search.best_trial": str(best)}
        self.handle.tag(told | {"search.best_run": found.trials[best].run})
        for trial in found.of_role("search"):
            if trial.run_id is not None:
                RunHandle(trial.run_id, self.handle.uri).tag({BEST_TAG: str(trial.number == best).lower()})


def _rows(found: Found) -> list[Row]:
    """The best value after so many finished trials, and what all had cost by then."""
    now = time.time_ns() // 1_000_000
    objective = found.search.objectives[0]
    rows: list[Row] = []
    ended = [trial for trial in found.of_role("search") if trial.state in ("finished", "stopped", "failed")]
    for count in range(1, len(ended) + 1):
        best = better(objective, [t for t in ended[:count] if t.state == "finished"])
        rows.append(Row("search/seconds", sum(t.seconds for t in ended[:count]), count, now))
        if best:
            rows.append(Row(f"search/best_{objective.name}", best[0].value(objective.name) or 0.0, count, now))
    return rows
