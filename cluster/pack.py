"""Pack a data set into Arrow shards: checks every label, keeps the image files as they are, resumes when killed."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from cluster.config import RunConfig


def act(config: "RunConfig") -> None:
    """Pack both splits and print what they hold."""
    from cluster.packing import pack_splits, summary
    from cluster.terminal import table

    table("packed", summary(pack_splits(config)))


if __name__ == "__main__":
    sys.exit(command("pack", __doc__ or "", act))
