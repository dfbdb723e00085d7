"""Pack a data set into Arrow shards: checks every label, keeps the image files as they are, resumes when killed."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from cluster.config import RunConfig


def act(config: "RunConfig") -> None:
    """Pack both splits and print what they hold, and what was wrong with them."""
    from cluster.packing import irregular, pack_splits, summary
    from cluster.terminal import table

    packed = pack_splits(config)
    table("packed", summary(packed))
    if found := irregular(packed):
        table("wrong or irregular", found)


if __name__ == "__main__":
    sys.exit(command("pack", __doc__ or "", act))
