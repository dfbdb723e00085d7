"""Look at a packed split or a teacher cache, in a folder or behind a URL: what it holds, whether every byte of it is as
it was written, and one sample as a picture."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.command import answered

EPILOG = """\
examples:
  python -m cluster.inspect runs/caches/teacher-bf4b978c2c9f
  python -m cluster.inspect s3://bucket/caches/teacher-bf4b978c2c9f --verify
  python -m cluster.inspect runs/caches/teacher-bf4b978c2c9f --sample 12 --png sample.png

The picture of a cache's sample needs the packed split that the teacher saw. It is looked for below the `data` folder
beside `caches`, as a run leaves it; `--data FOLDER` names it elsewhere.

exit codes:
  0 all is well; 3 something is not as it was written; 2 something to put right; 1 a bug or a broken machine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, look and print; the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("place", metavar="PATH", help="a folder that holds a manifest.json, or the URL of one")
    parser.add_argument("--verify", action="store_true", help="read every byte and list all that has changed")
    parser.add_argument("--sample", type=int, metavar="N", help="the sample at this place in the index, from 0")
    parser.add_argument("--png", type=Path, metavar="FILE", help="where its picture goes (default: sample-N.png)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the packed split that a cache was filled from")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error came from")
    options = parser.parse_args(arguments)
    return answered(lambda: act(options), debug=options.debug)


def act(options: argparse.Namespace) -> int:
    """Everything that was asked for, each with a table."""
    from cluster import inspecting
    from cluster.grammar import ConfigError
    from cluster.terminal import table

    if options.png is not None and options.sample is None:
        raise ConfigError("--png needs --sample N, the sample that is to be drawn")
    found = inspecting.look(options.place)
    damages = found.damaged_head
    if found.rows:
        table(found.kind, [{"what": w, "value": v} for w, v in found.rows], left=True)
    if options.verify:
        damages = inspecting.verified(found)
    if damages:
        rows = [{"file": d.file, "row": d.row, "sample": d.sample, "what": d.what} for d in damages]
        table(f"{len(damages)} thing(s) are not as they were written", rows, left=True)
        return 3
    if options.verify:
        table("verified", inspecting.read_rows(found), left=True)
    if options.sample is not None:
        path = options.png or Path(f"sample-{options.sample}.png")
        rows = inspecting.drawn(found, options.sample, path, options.data)
        table(f"sample {options.sample}", [{"what": w, "value": v} for w, v in rows], left=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
