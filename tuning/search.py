"""Search the settings of a space for a recipe's best student: trials on Ray Tune, seeds against luck, a winner or none.
The same command continues what was begun."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.command import answered
from cluster.grammar import ConfigError, from_arguments
from cluster.grammar import find as find_recipe
from cluster.part import Part
from tuning.plan import Plan, make_plan
from tuning.space import find as find_space
from tuning.space import shipped

EPILOG = """\
settings:
  KEY=VALUE            a setting of the recipe, the same in all trials
  search.KEY=VALUE     how to search: searcher (tpe, random, grid), trials, objectives, stopping (none, asha), seeds
  space.KEY=VALUE      what KEY is drawn from, instead of the file's; null: not at all
  `--show` checks everything and prints what would be done.

examples:
  python -m tuning.search my_recipe.yaml scalekd
  python -m tuning.search my_recipe.yaml scalekd search.stopping=asha evaluation.every=100 search.trials=40
  python -m tuning.search my_recipe.yaml teacher space.teachers.0.weights='{{"choice": ["runs/s", "runs/l"]}}'

shipped spaces:
{shipped}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where trials are left that the same command would continue."""
    options = _parser().parse_intermixed_args(arguments)
    return answered(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    purposes = {name: path.read_text().partition("\n")[0].removeprefix("#").strip() for name, path in shipped().items()}
    parser = argparse.ArgumentParser(
        prog="python -m tuning.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.format(shipped="\n".join(f"  {name:18s} {told}" for name, told in purposes.items())),
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe; with the teacher in it")
    parser.add_argument("space", help="a YAML file of keys and distributions, or the name of a shipped one")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, see below")
    parser.add_argument("--show", action="store_true", help="check everything, print what would be done and stop")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def _run(options: argparse.Namespace) -> int:
    recipe, space, given = find_recipe(options.recipe), find_space(options.space), from_arguments(options.settings)
    plan = _checked_alone(recipe, space, given)
    if plan is None or not options.show:
        from cluster import config

        plan = make_plan(config, recipe, space, given)
    if options.show:
        sys.stdout.write(_told(plan))
        return 0
    from tuning.searching import search

    return search(plan)


def _checked_alone(recipe: Path, space: Path, given: dict[str, Any]) -> Plan | None:
    """The plan, checked without importing what reads the settings; ConfigError for its mistakes."""
    try:
        return make_plan(Part("cluster.config"), recipe, space, given)
    except ConfigError:
        raise
    except Exception:
        # Some plug-in's settings do not run without the rest of its file: seconds later, the whole import tells.
        return None


def _told(plan: Plan) -> str:
    options, timing = plan.options, plan.timing
    lines = [f"{plan.name}: {plan.trials} trial(s) of {timing.steps} steps by {options.searcher}, in {plan.folder}"]
    lines += [f"  {key.name}: {dict(key.words)}" for key in plan.space.keys]
    wanted = ", ".join(f"{one.name} ({one.goal})" for one in options.wanted)
    lines.append(f"for {wanted}; the best {options.best} on {options.seeds} seed(s) beside the plain student")
    if timing.rungs:
        lines.append(f"stopped early by {options.stopping} at steps {', '.join(map(str, timing.rungs))}")
    if timing.gate:
        early = ", ".join(key.name for key in plan.space.keys if key.name not in timing.late) or "settings"
        lines.append(f"trials with the same {early} begin at step {timing.gate}, from one common warm-up")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
