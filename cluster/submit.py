"""Run a recipe on a running Ray cluster: sends the working tree, follows the log, ends with the job's exit code.

The same run name again continues the run. Ctrl-C ends the following, not the job, unless --stop is given.
"""

import argparse
import os
import sys

from cluster.command import answered
from cluster.grammar import ConfigError, find, from_arguments

VERBS = ("train", "pack", "cache_teacher", "evaluate", "doctor")
DEFAULT = "http://127.0.0.1:8265"
EPILOG = """\
exit codes:
  the job's own; 130 a stopped job, or following was interrupted; 2 something to put right before

examples:
  python -m cluster.submit scalekd_fcos_r50_coco storage=/shared/minnow resources.workers=8 ...
  python -m cluster.submit my_recipe.yaml name=second --address http://127.0.0.1:8265 --detach
  python -m cluster.submit digits_student storage=/shared/minnow --verb pack
"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("recipe", help="a YAML file in the working tree, or the name of a shipped recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings laid over the recipe")
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT), help="the job server")
    parser.add_argument("--verb", choices=VERBS, default="train", help="what the job does with the recipe")
    parser.add_argument("--detach", action="store_true", help="do not follow the log")
    parser.add_argument("--stop", action="store_true", help="Ctrl-C stops the job as well")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    options = parser.parse_intermixed_args()
    return answered(lambda: _submit(options), debug=options.debug)


def _submit(options: argparse.Namespace) -> int:
    from cluster.submitting import Submission, readable, submit

    path = find(options.recipe)
    if leaking := readable(options.settings, os.environ):
        raise ConfigError(
            f"{', '.join(leaking)}: holds a secret of this environment, and settings are logged; give secrets to the "
            "nodes as environment variables instead"
        )
    name = _checked(path, options.settings)
    submission = Submission(
        address=options.address, verb=options.verb, recipe=path, settings=tuple(options.settings), name=name
    )
    job = submit(submission)
    sys.stderr.write(f"job {job} is sent to {options.address}\n")
    how = f"ray job logs --follow --address {options.address} {job}"
    if options.detach:
        sys.stderr.write(f"follow it: {how}\nstop it:   ray job stop --address {options.address} {job}\n")
        return 0
    return _follow(options, job, how)


def _follow(options: argparse.Namespace, job: str, how: str) -> int:
    from cluster.submitting import STOPPED, follow, stop

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return follow(options.address, job, write)
    except KeyboardInterrupt:
        if options.stop:
            stop(options.address, job)
            sys.stderr.write(f"job {job} was asked to stop\n")
        else:
            sys.stderr.write(f"job {job} goes on; follow it: {how}\n")
        return STOPPED


def _checked(path: object, settings: list[str]) -> str:
    """The run's name; ConfigError for the recipe's mistakes and for every relative path."""
    from cluster.config import load
    from cluster.places import require_absolute

    config = load(str(path), from_arguments(settings))
    require_absolute(config)
    return config.name


if __name__ == "__main__":
    sys.exit(main())
