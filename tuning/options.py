"""How a space is searched: `search.KEY=VALUE` on the command line, or the `search` section of a space's file."""

from dataclasses import dataclass
from typing import Literal

from tuning.trials import Objective

LITTLE = ("ms_per_image", "parameters", "gflops", "memory_bytes")
"""Objectives of which less is better."""
MOST_SEEDS = 10


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (pydantic's own spelling)

    name: str | None = None
    """Runs are called NAME_trial000, ...; null: the recipe's name and the space's."""
    searcher: Literal["tpe", "random", "grid", "population"] = "tpe"
    """`tpe`: Optuna's, which learns from what was found; of several objectives it seeks the front. `population`:
    settings change while students learn; only those may be searched that are no part of what is built."""
    trials: int | None = None
    """How many are drawn; null: 24, or all points of a grid."""
    objectives: tuple[str, ...] = ("AP_small",)
    """Numbers of the evaluation; more is better, but of ms_per_image, parameters, gflops and memory_bytes."""
    stopping: Literal["none", "asha"] = "none"
    """`asha`: at steps that grow by `keep`, a trial that is not among the best of those that came there is stopped."""
    grace: float | None = None
    """Share of the schedule before which no trial is stopped; null: the end of the last method's ramp."""
    keep: int = 3
    """ASHA lets the best 1/keep go on."""
    warmup: Literal["auto", "shared", "own"] = "auto"
    """`shared`: trials that differ only after their methods' gate begin from one checkpoint that was trained up to it;
    `own`: each from step 0; to the bit the same. `auto`: shared where that spares more steps than the runs cost that
    train the common part."""
    startup: int = 8
    """Trials that TPE draws at random before it learns."""
    members: int = 6
    """Of a population."""
    generations: int = 4
    """Equal parts of the schedule after which a population's worst are replaced; evaluations must fall on them."""
    best: int = 3
    """Configurations that run again on further seeds."""
    seeds: int = 3
    """Seeds of each of these, the search's own included, and of the plain student; 1: no second look."""
    at_once: int | None = None
    """Trials that run at a time; null: as many as the cluster's cores and GPUs hold."""
    seed: int = 0
    """Of the searcher's draws."""

    def __post_init__(self) -> None:
        for name, least in (
            ("trials", 1),
            ("at_once", 1),
            ("best", 1),
            ("startup", 1),
            ("seed", 0),
            ("keep", 2),
            ("members", 2),
            ("generations", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ValueError(f"seeds must be in 1..{MOST_SEEDS}, got {self.seeds}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives are one or more different names, got {list(self.objectives)}")
        if self.grace is not None and not 0 < self.grace < 1:
            raise ValueError(f"grace is a share of the schedule in (0, 1), got {self.grace}")

    @property
    def wanted(self) -> tuple[Objective, ...]:
        """The objectives with their goals."""
        return tuple(Objective(name=name, goal="min" if name in LITTLE else "max") for name in self.objectives)
