"""Train the plain student and a list of methods at one budget from one shared cache, seeds in rounds; say for each
whether it is better, worse or no different. The same command continues what was begun."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.command import answered
from cluster.comparison.plan import REFERENCES, Plan, Wanted, find_rows, make_plan, shipped
from cluster.grammar import ConfigError, find, from_arguments
from cluster.part import Part

MOST_SEEDS = 10
EPILOG = """\
rows:
  The plain student on the same views is what every other row is compared with. A method's row has the settings of the
  recipe's `distill` section for it, else its own defaults; a file of rows lays its own over the recipe's:
    fitnet_weak: {{fitnet: {{weight: 0.1}}}}
    sdf_csa: {{scalekd: {{alpha: 2.5e-3, beta: 0.02}}}}
  Further plain students: equal_time (as long as the slowest method takes), fresh (no view twice), double (2x input).

examples:
  python -m cluster.compare_methods my_recipe.yaml --methods fitnet,pkd,cwd --seeds 3
  python -m cluster.compare_methods my_recipe.yaml --rows my_rows.yaml --references none optim.steps=600

shipped files of rows: {shipped}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where a row failed."""
    options = _parser().parse_intermixed_args(arguments)
    return answered(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.compare_methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.format(shipped=", ".join(shipped())),
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe; with the teacher in it")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over the recipe, for all rows")
    parser.add_argument("--methods", help="rows of the file, or methods: fitnet,pkd; default: all rows of the file")
    parser.add_argument("--rows", help="a YAML file of rows, name: {method: {setting: value}}, or a shipped one")
    parser.add_argument("--seeds", type=int, default=3, help=f"runs per row, up to {MOST_SEEDS}")
    parser.add_argument("--references", default=",".join(REFERENCES), help="further plain students, or none")
    parser.add_argument("--show", action="store_true", help="print the table of what is done and train nothing")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def _run(options: argparse.Namespace) -> int:
    overrides, path, wanted = from_arguments(options.settings), find(options.recipe), _wanted(options)
    _checked_alone(path, overrides, wanted)
    from cluster import config
    from cluster.comparison import comparing
    from cluster.places import anchored

    base = anchored(config.load(path, overrides))
    plan = make_plan(config, base, wanted)
    if options.show:
        comparing.show(plan)
        return 0
    failed = comparing.compare(plan, base)
    for row, reason in failed.items():
        sys.stderr.write(f"{row} failed: {reason}\n")
    return 1 if failed else 0


def _wanted(options: argparse.Namespace) -> Wanted:
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds: 1 to {MOST_SEEDS}, got {options.seeds}")
    kinds = () if options.references in ("none", "") else tuple(options.references.split(","))
    if unknown := [kind for kind in kinds if kind not in REFERENCES]:
        raise ConfigError(f"--references: no {', '.join(unknown)}; known: {', '.join(REFERENCES)}, or none")
    methods = None if options.methods is None else tuple(dict.fromkeys(options.methods.split(",")))
    rows = None if options.rows is None else find_rows(options.rows)
    return Wanted(methods=methods, rows=rows, seeds=options.seeds, references=kinds)


def _checked_alone(path: Path, overrides: dict[str, Any], wanted: Wanted) -> Plan | None:
    """The plan, checked without importing what reads the settings; ConfigError for its mistakes."""
    settings: Any = Part("cluster.config")
    try:
        return make_plan(settings, settings.load(path, overrides), wanted)
    except ConfigError:
        raise
    except Exception:
        # Some plug-in's settings do not run without the rest of its file: seconds later, the whole import tells.
        return None


if __name__ == "__main__":
    sys.exit(main())
