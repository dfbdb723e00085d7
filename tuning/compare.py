"""Runs side by side, out of MLflow: settings that differ, metrics with paired differences where seeds match, curves.

Runs that differ by their seed alone are one row. Everything is compared to the first row; with --base to another.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.command import answered
from cluster.grammar import ConfigError

if TYPE_CHECKING:
    from tuning.tracked import Tracker

EPILOG = """\
examples:
  python -m tuning.compare plain_seed0 plain_seed1 scalekd_seed0 scalekd_seed1
  python -m tuning.compare --experiment minnow --base plain_seed0 --metrics AP_small ms_per_image
  python -m tuning.compare RUN_ID RUN_ID --tracking http://mlflow.example:5000 --png curves.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where there was something to compare."""
    options = _parser().parse_args(arguments)
    return answered(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tuning.compare", description=__doc__, formatter_class=raw, epilog=EPILOG
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's MLflow id, its name, or its folder")
    parser.add_argument("--experiment", help="all evaluated runs of this experiment, after those that are named")
    parser.add_argument("--base", help="a run of the row that the others are compared to: its id, name or folder")
    parser.add_argument("--metrics", nargs="+", default=["AP", "AP_small"], help="default: AP AP_small")
    parser.add_argument("--tracking", metavar="URI", help="MLflow's URI; without it the database below --storage")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    parser.add_argument("--png", type=Path, default=Path("compare.png"), help="the curves (compare.png)")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not options.runs and options.experiment is None:
        raise ConfigError("name two or more runs, or --experiment NAME; --help shows examples")
    from mlflow.exceptions import MlflowException

    from tuning.tracked import tracker_of

    tracker = tracker_of(options.tracking, options.storage)
    try:
        return _compared(options, tracker)
    except MlflowException as error:
        raise ConfigError(f"{tracker.uri} does not answer as MLflow does: {error.message}") from None


def _compared(options: argparse.Namespace, tracker: "Tracker") -> int:
    from cluster.terminal import table
    from tuning import side_by_side
    from tuning.tracked import FINISHED

    named = tracker.named([*([options.base] if options.base else []), *options.runs])
    others = tracker.of_experiment(options.experiment) if options.experiment is not None else []
    runs = list({run.run_id: run for run in [*named, *others]}.values())
    unfinished = Counter(run.status for run in runs if run.status != FINISHED)
    rows = side_by_side.rows(runs)
    if not rows:
        raise ConfigError(f"none of {len(runs)} run(s) is finished; there is nothing to compare yet")
    side_by_side.require_metrics(rows, options.metrics)
    table(f"{len(runs)} runs of {tracker.uri}", side_by_side.shown(rows, options.metrics), left=True)
    kept = [run for row in rows for run in row.runs.values()]
    curves = {metric: {run.run_id: tracker.curve(run, metric) for run in kept} for metric in options.metrics}
    side_by_side.picture(rows, curves, options.metrics, options.png)
    out = sys.stdout
    out.write(f"difference: to {rows[0].name}, paired by seed: mean, 95 % interval (pairs)\n")
    if unfinished:
        out.write(f"left out: {', '.join(f'{n} {status.lower()}' for status, n in unfinished.items())}\n")
    doubled = len(runs) - sum(unfinished.values()) - len(kept)
    if doubled:
        out.write(f"left out: {doubled} earlier run(s) of the same settings and seed\n")
    out.write(f"curves: {options.png}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
