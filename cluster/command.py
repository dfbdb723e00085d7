"""The frame of every `python -m cluster.<verb> RECIPE [key=value ...]`.

Arguments and recipe are checked before anything heavy is imported: `--help`, `--show` and a mistake answer at once.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cluster.grammar import REQUIRED, ConfigError, find, from_arguments, recipes
from cluster.part import Part

if TYPE_CHECKING:
    from cluster.config import RunConfig

NO_SWITCHES: Mapping[str, str] = MappingProxyType({})
EPILOG = """\
settings:
  A setting is a dotted key of the recipe and a value in JSON or plain text; the last word is the command line's:
    optim.lr=2e-4   views.short_side=[800]   optim.ema=null   distill.pkd.weight=6   teachers.0.weights=runs/big/student
  `distill={{}}` trains without a teacher. `--show` prints the recipe with all its settings, after checking it.

examples:
  python -m cluster.{verb} {example}
  python -m cluster.{verb} {example} name=second optim.steps=200
  python -m cluster.{verb} my_recipe.yaml --show

shipped recipes (by name, or copy one from {folder}):
{shipped}
"""


def command(
    verb: str,
    about: str,
    act: Callable[..., int | None],
    arguments: Sequence[str] | None = None,
    *,
    switches: Mapping[str, str] = NO_SWITCHES,
) -> int:
    """Run a verb on the recipe that the command line names; the process's exit code.

    0: done. 1: a bug or a broken machine, with a traceback. 2: something for the user to put right, in one message.
    130: interrupted. `act`, which gets the recipe, may return another code than 0; `switches` (name -> help) are
    further options of the verb, which it gets as booleans by name.
    """
    options = _parser(verb, about, switches).parse_intermixed_args(arguments)
    asked = {name: getattr(options, name) for name in switches}
    return answered(lambda: _run(options, partial(act, **asked)), debug=options.debug)


def answered(work: Callable[[], int], *, debug: bool) -> int:
    """What `work` returns as the exit code; 1, 2 and 130 as `command` says, with what a person should read."""
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        if debug or not for_people(error):
            traceback.print_exc()
        else:
            sys.stderr.write(f"{error}\n")
        return 2 if for_people(error) else 1


def for_people(error: BaseException) -> bool:
    """Whether an error is a message to the user: a ConfigError, a ValueError that our own code raised on purpose (a
    library's ValueError is a bug of ours), or a file that the recipe names and nobody can open."""
    if isinstance(error, ConfigError):
        return True
    if isinstance(error, FileNotFoundError | PermissionError):
        return error.filename is not None
    if type(error) is not ValueError or error.__traceback__ is None:
        return False
    raised = traceback.extract_tb(error.__traceback__)[-1]
    packages = {folder.name for folder in Path(raised.filename).resolve().parents}
    return bool(packages & {"data_sharding", "kd", "cluster", "tuning"}) and (raised.line or "").startswith("raise ")


def _run(options: argparse.Namespace, act: Callable[["RunConfig"], int | None]) -> int:
    overrides = from_arguments(options.settings)
    path = find(options.recipe)
    shown = _checked_alone(path, overrides)
    if shown is not None and options.show:
        sys.stdout.write(shown)
        return 0
    from cluster.config import load, to_recipe
    from cluster.places import anchored

    config = load(path, overrides)
    if options.show:
        sys.stdout.write(to_recipe(config))
        return 0
    return act(anchored(config)) or 0


def _checked_alone(path: Path, overrides: Mapping[str, Any]) -> str | None:
    """The recipe with all its settings, checked without importing what reads them; ConfigError for its mistakes."""
    settings: Any = Part("cluster.config")
    try:
        return settings.to_recipe(settings.load(path, overrides))
    except ConfigError:
        raise
    except Exception:
        # Some plug-in's settings do not run without the rest of its file: seconds later, the whole import tells.
        return None


def _parser(verb: str, about: str, switches: Mapping[str, str]) -> argparse.ArgumentParser:
    shipped = {name: _purpose(path) for name, path in recipes().items()}
    complete = [name for name, path in recipes().items() if REQUIRED not in path.read_text()]
    parser = argparse.ArgumentParser(
        prog=f"python -m cluster.{verb}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.format(
            verb=verb,
            example=next(iter(complete), "my_recipe.yaml"),
            folder="cluster/recipes",
            shipped="\n".join(f"  {name:22s} {purpose}" for name, purpose in shipped.items()),
        ),
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over the recipe")
    for name, told in switches.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=told)
    parser.add_argument("--show", action="store_true", help="check the recipe, print all its settings and stop")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def _purpose(recipe: Path) -> str:
    """The first comment line of a recipe."""
    first = recipe.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
