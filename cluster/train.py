"""Train a student by its recipe: packs, checks and caches what is missing, resumes what was begun, logs to MLflow."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from cluster.config import RunConfig


def act(config: "RunConfig") -> None:
    """Train and print the closing table."""
    from cluster.terminal import table
    from cluster.training import rows, train

    table("trained", rows(config, train(config)))


if __name__ == "__main__":
    sys.exit(command("train", __doc__ or "", act))
