"""A search from its first look at the data to the winner's recipe: what all trials share first, then trial by trial."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.config import check, to_recipe, to_tree
from cluster.driver import ray_started, say
from cluster.grammar import ConfigError, overlay
from cluster.places import anchored
from cluster.recovery.claim import alone
from cluster.tracking import RUN_FILE
from data_sharding.files import write_atomically
from tuning.board import Board, shown, summary
from tuning.conclusion import conclude
from tuning.desk import Desk
from tuning.plan import Plan
from tuning.population import Population
from tuning.preparing import configs_of, places, prepare, stores_of
from tuning.record import Record
from tuning.searchers import Grid, Random, Searcher, Tpe
from tuning.stopping import Asha, Never, Stopping
from tuning.trial_store import TrialStore, store_of
from tuning.trials import Found, Search, Trial

BEST = "best.yaml"


def search(plan: Plan) -> int:
    """Do what is left of the search; 1 where trials broke off that the same command would continue."""
    plan = _anchored(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with alone(plan.folder), ray_started():
        configs = configs_of(plan)
        prepare(plan, configs)
        at_once, gpu = places(plan, configs[0])
        store = _begun(plan, "wall" if gpu else "processor")
        record = Record.opened(configs[0], plan, store)
        board = Board(plan, store.read())
        desk = Desk(
            plan=plan,
            store=store,
            searcher=_searcher(plan),
            stopping=_stopping(plan),
            at_once=at_once,
            changed=board.changed,
        )
        stores = stores_of(configs)
        record.running()
        try:
            from tuning.driving import drive

            with shown(board):
                drive(desk, lambda trial: _job(plan, trial, stores, record, store))
            found = _concluded(plan, desk, store, stores)
            _report(plan)
            record.close(found, broken=bool(desk.broken))
        except BaseException as error:
            record.stopped(error)
            raise
    summary(plan, found)
    for trial in desk.broken:
        sys.stderr.write(f"trial {trial.number} broke off and is continued by the same command: {trial.why}\n")
    return 1 if desk.broken else 0


def _anchored(plan: Plan) -> Plan:
    """With absolute paths: trials run elsewhere."""
    config = anchored(check(overlay(plan.tree, plan.space.changes(plan.space.probes()[0])), "the recipe"))
    where: dict[str, Any] = {"storage": str(config.storage), "tracking.uri": config.tracking.uri}
    return replace(plan, storage=str(config.storage), tree=overlay(plan.tree, where))


def _searcher(plan: Plan) -> Searcher | Population:
    options = plan.options
    if options.searcher == "population":
        return Population(
            space=plan.space,
            objective=options.wanted[0],
            members=options.members,
            ends=plan.timing.ends,
            seed=options.seed,
        )
    if options.searcher == "grid":
        return Grid(space=plan.space)
    if options.searcher == "random":
        return Random(space=plan.space, seed=options.seed)
    return Tpe(space=plan.space, objectives=options.wanted, seed=options.seed, startup=options.startup)


def _stopping(plan: Plan) -> Stopping:
    if plan.options.stopping == "none":
        return Never()
    return Asha(objective=plan.options.wanted[0], rungs=plan.timing.rungs, keep=plan.options.keep)


def _begun(plan: Plan, clock: Any) -> TrialStore:
    """The store, which is new or holds this very search; ConfigError where it holds another."""
    store = store_of(plan.folder)
    fixed = _fixed(plan)
    if not store.exists():
        store.write(Found(search=replace(fixed, clock=clock, begun=datetime.now(UTC).isoformat(timespec="seconds"))))
        return store
    old = store.read()
    names = ("settings", "keys", "objectives", "searcher", "stopping", "steps", "seed")
    plain = json.loads(json.dumps({name: getattr(fixed, name) for name in names}, default=vars))
    kept = json.loads(json.dumps({name: getattr(old.search, name) for name in names}, default=vars))
    changed = [f"{name}: {kept[name]} -> {plain[name]}" for name in names if kept[name] != plain[name]]
    if changed:
        raise ConfigError(
            f"search {plan.name!r} in {plan.folder} was begun in another way; set it back, or choose a new "
            "search.name:\n  " + "\n  ".join(changed)
        )
    store.write(replace(old, search=replace(old.search, trials=plan.trials)))
    return store


def _fixed(plan: Plan) -> Search:
    lasting = {k: v for k, v in plan.tree.items() if k not in ("storage", "tracking", "resources", "name")}
    options = plan.options
    return Search(
        name=plan.name,
        recipe=plan.recipe,
        space=plan.space.name,
        keys={key.name: dict(key.words) for key in plan.space.keys},
        objectives=options.wanted,
        searcher=options.searcher,
        stopping=options.stopping,
        trials=plan.trials,
        steps=plan.timing.steps,
        grace=plan.timing.grace,
        seed=options.seed,
        settings=hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()[:16],
    )


def _job(plan: Plan, trial: Trial, stores: Mapping[str, Any], record: Record, store: TrialStore) -> dict[str, Any]:
    """What a trial's process gets: plain values."""
    found = store.read()
    tree = recipe_of(plan, trial)
    origin = None if trial.origin is None else found.trials[trial.origin]
    more: dict[str, Any] = dict(stores) if tree.get("distill") else {}
    if origin is not None:
        more["resources.begin"] = origin.checkpoint
    if trial.until is not None:
        more["resources.until"] = trial.until
    return {
        "number": trial.number,
        "run": trial.run,
        "tree": to_tree(anchored(check(overlay(tree, more), f"trial {trial.number}"))),
        "tags": record.tags(trial),
        "wanted": [objective.name for objective in plan.options.wanted],
        "clock": found.search.clock,
        "before": 0.0 if origin is None else origin.seconds,
    }


def recipe_of(plan: Plan, trial: Trial) -> dict[str, Any]:
    """The recipe of a trial's run."""
    if trial.role == "plain":
        return plan.plain_recipe(trial.run, trial.seed)
    return plan.recipe_of(trial.run, trial.seed, trial.changes)


def _report(plan: Plan) -> None:
    """The page and figures beside the store, from where they go into the search's run."""
    from tuning.reporting import write

    say(f"report: {write(plan.folder)[0]}")


def _concluded(plan: Plan, desk: Desk, store: TrialStore, stores: Mapping[str, Any]) -> Found:
    """Store the answer, and write the winner's recipe, which reads the search's own cache."""
    found = store.read()
    # Of a trial that was stopped or refused nobody told its run.
    found = replace(found, trials=tuple(replace(t, run_id=t.run_id or run_id_of(plan, t)) for t in found.trials))
    chosen = desk.contenders(found.of_role("search"))
    found = replace(found, conclusion=conclude(found, chosen))
    store.write(found)
    if found.conclusion is not None:
        best = found.trials[found.conclusion.best]
        tree = plan.recipe_of(f"{plan.name}_best", best.seed, best.changes)
        config = check(overlay(tree, stores if tree.get("distill") else {}), "the best trial")
        write_atomically(plan.folder / BEST, to_recipe(config).encode())
    return found


def run_id_of(plan: Plan, trial: Trial) -> str | None:
    """The MLflow run of a trial that was begun."""
    remembered = Path(plan.storage) / trial.run / RUN_FILE
    return json.loads(remembered.read_text())["run_id"] if remembered.exists() else None
