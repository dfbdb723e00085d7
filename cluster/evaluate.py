"""Evaluate the student of a finished run, or any saved detector, on the recipe's validation split."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from cluster.config import RunConfig


def act(config: "RunConfig") -> None:
    """Score the run's student on all workers and print every number."""
    from cluster.evaluating import evaluate
    from cluster.terminal import table

    found = evaluate(config)
    table(f"{config.name} on val", [{"metric": name, "value": value} for name, value in found.items()])


if __name__ == "__main__":
    sys.exit(command("evaluate", __doc__ or "", act))
