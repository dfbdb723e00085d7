"""Write the report of a search, finished or not: one HTML page and its figures, beside what the search has found and in
its MLflow run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.command import answered
from cluster.grammar import ConfigError
from tuning.trial_store import FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 where all was written."""
    options = _parser().parse_args(arguments)
    return answered(lambda: _run(options), debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuning.report", description=__doc__)
    parser.add_argument("search", help="the search's name, its folder, or the search.json in it")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="where a search of that name is kept (runs)")
    parser.add_argument("--only-files", action="store_true", help="leave MLflow as it is")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    return parser


def _run(options: argparse.Namespace) -> int:
    folder = find(options.search, options.storage)
    from tuning import reporting
    from tuning.trial_store import store_of

    files = reporting.write(folder)
    sys.stdout.write(f"report: {files[0]} and {len(files) - 1} figures beside it\n")
    found = store_of(folder).read()
    if found.search.parent_run and not options.only_files:
        from mlflow.exceptions import MlflowException

        try:
            reporting.log(found, files)
        except MlflowException as error:
            raise ConfigError(
                f"the files are written, but {found.search.tracking} cannot keep copies in the search's run "
                f"{found.search.parent_run} ({error.message}); take --only-files to leave MLflow as it is"
            ) from None
    return 0


def find(search: str, storage: Path) -> Path:
    """The folder of a search that is named in any of three ways. ConfigError where there is none."""
    asked = Path(search)
    places = [asked.parent if asked.name == FILE else asked, storage / search, storage / f"{search}_search"]
    for place in places:
        if (place / FILE).is_file():
            return place
    known = sorted(path.parent.name.removesuffix("_search") for path in storage.glob(f"*/{FILE}"))
    there = f"there: {', '.join(known)}" if known else "no search was begun there; --storage names another place"
    raise ConfigError(f"no search {search!r}, neither as a folder nor in {storage}; {there}")


if __name__ == "__main__":
    sys.exit(main())
