"""Compare methods: everything that can be wrong first, then every run by `cluster.training`, then table and plot."""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster import build
from cluster.comparison import table as comparison_table
from cluster.comparison.plan import Plan, Row
from cluster.comparison.runs import Runs, require_same_settings
from cluster.comparison.store import Store
from cluster.config import RunConfig, check
from cluster.driver import ray_started, say
from cluster.gate import require_good_teachers
from cluster.grammar import ConfigError
from cluster.metric_log import Row as MetricRow
from cluster.packing import pack_splits
from cluster.pairs import require_fitting_pairs
from cluster.recovery.claim import alone
from cluster.terminal import table
from cluster.tracking import RunHandle, open_run
from cluster.training import train
from kd.plugins import plugin
from kd.teacher import all_reads

FILE, CSV, PLOT = "comparison.json", "comparison.csv", "comparison.png"


def compare(plan: Plan, base: RunConfig) -> dict[str, str]:
    """Do what is left of the comparison; what failed, by row, and why."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    store = Store(plan.folder / FILE)
    stores = _stores(plan, base)
    require_same_settings(plan, store)
    with alone(plan.folder), ray_started():
        pack_splits(base)
        _require_rows_that_fit(plan, base)
        store.require_teachers(_teachers(base))
        handle = open_run(replace(base, name=plan.folder.name), plan.storage, {"minnow.comparison": base.name})
        runs = Runs(
            plan=plan,
            store=store,
            train=lambda config, row: train(config, _tags(handle, row)),
            fresh_views=lambda: _fresh_views(base),
            stores=stores,
            say=say,
        )
        try:
            if any(row.kind == "method" for row, _ in runs.left()):
                store.settle("teachers_ap", _gated(plan, stores))
            failed = runs.go(lambda: _publish(plan, store, handle))
        except BaseException as error:
            handle.close("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        handle.close("FAILED" if failed else "FINISHED")
    return failed


def show(plan: Plan) -> None:
    """Print the table of what is stored."""
    content = Store(plan.folder / FILE).read()
    rows = comparison_table.rows(content["runs"])
    if rows:
        table(_title(plan, rows), comparison_table.shown(rows))
    for line in [*comparison_table.caption(content), *plan.notes]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{len(content['runs'])} run(s) done; kept in {plan.folder}\n")


def _title(plan: Plan, rows: list[dict[str, Any]]) -> str:
    return f"{plan.recipe}: {len(rows)} rows"


def _publish(plan: Plan, store: Store, handle: RunHandle) -> None:
    """Print the table; keep it as CSV and plot, beside the rows and in MLflow."""
    show(plan)
    runs = store.runs()
    rows = comparison_table.rows(runs)
    if not rows:
        return
    handle.add_file(comparison_table.write_csv(rows, plan.folder / CSV))
    handle.add_file(comparison_table.write_plot(rows, _title(plan, rows), plan.folder / PLOT))
    handle.add_file(store.path)
    now = time.time_ns() // 1_000_000
    told = {f"{score}/{row['row']}": row[score] for row in rows for score in ("AP", "AP_small", "difference")}
    step = max(row["seeds"] for row in rows)
    handle.ship([MetricRow(key, value, step, now) for key, value in told.items() if value is not None])


def _tags(handle: RunHandle, row: Row) -> dict[str, str]:
    return {"mlflow.parentRunId": handle.run_id, "comparison.row": row.name}


def _gated(plan: Plan, stores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The teachers' AP, each at or above its gate, where any row learns from one."""
    methods = (row for row in plan.rows if row.kind == "method")
    made = (check(plan.run(row, 0, stores), f"row {row.name}") for row in methods)
    return next((require_good_teachers(config) for config in made if config.taught), {})


def _require_rows_that_fit(plan: Plan, base: RunConfig) -> None:
    """ConfigError that tells of every row whose method cannot bring student and teacher together."""
    categories = build.open_val(base).dataset.categories
    wrong: list[str] = []
    for row in plan.rows:
        if row.kind != "method":
            continue
        try:
            require_fitting_pairs(check(plan.run(row, 0, {}), f"row {row.name}"), categories)
        except ConfigError as error:
            wrong.append(f"row {row.name}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _teachers(base: RunConfig) -> dict[str, str]:
    categories = build.open_val(base).dataset.categories
    return {teacher.name: build.load_teacher(teacher, categories).sha256 for teacher in base.teachers}


def _stores(plan: Plan, base: RunConfig) -> Mapping[str, Any]:
    """What the teachers' caches hold: all that any row's methods read, so that one cache serves all rows."""
    methods = {method for row in plan.rows for method in row.tree["distill"]}
    reads = sorted(all_reads([plugin("kd.methods", method).Loss.reads for method in methods]))
    return {f"teachers.{number}.stores": reads for number in range(len(base.teachers))}


def _fresh_views(base: RunConfig) -> int:
    """`views.count` with which no epoch of the run sees a view again."""
    train_split = build.open_train(base)
    epochs = build.build_order(base, train_split).position(base.optim.steps - 1)[0] + 1
    per_count = train_split.views.count // base.views.count
    return max(base.views.count, -(-epochs // per_count))
