"""What a key of a space is drawn from: each can be drawn, listed for a grid, and probed against a recipe.

    {uniform: [0.0, 1.0]}            {loguniform: [1e-4, 1e-1]}      {int: [16, 96], step: 16}
    {choice: [1, 4, 8]}              {choice: {small: {weights: a}, large: {weights: b}}}

`points: 5` says how many values a grid takes of a continuous one. The values of a choice may be named; a value that is
a mapping is laid over what stands at the key, setting by setting (an empty one empties it).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cluster.grammar import REQUIRED, ConfigError, flatten, to_text

if TYPE_CHECKING:
    import optuna

KINDS = ("uniform", "loguniform", "int", "choice")


class Distribution(Protocol):
    """Where the values of one key come from."""

    def draw(self, trial: "optuna.Trial", key: str) -> Any:
        """A value, chosen by an Optuna trial."""
        ...

    def parameter(self, value: Any) -> Any:
        """The value as Optuna knows it."""
        ...

    def shape(self) -> "optuna.distributions.BaseDistribution":
        """The same in Optuna's words."""
        ...

    def grid(self) -> list[Any]:
        """All values that a grid tries. Raises ValueError where it cannot be told."""
        ...

    def probes(self) -> list[Any]:
        """The values that a recipe must accept for it to accept all."""
        ...

    def changes(self, key: str, value: Any) -> dict[str, Any]:
        """The dotted settings that a value means."""
        ...


@dataclass(frozen=True, kw_only=True)
class Real:
    """Between two numbers, evenly or evenly in the logarithm."""

    low: float
    high: float
    log: bool = False
    points: int | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ValueError(f"the lower end must be below the upper one, got [{self.low}, {self.high}]")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithm needs ends above 0, got [{self.low}, {self.high}]; take uniform")
        if self.points is not None and self.points < 2:
            raise ValueError(f"points must be >= 2, got {self.points}")

    def draw(self, trial: "optuna.Trial", key: str) -> float:
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def parameter(self, value: Any) -> float:
        return float(value)

    def shape(self) -> "optuna.distributions.BaseDistribution":
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def grid(self) -> list[Any]:
        if self.points is None:
            raise ValueError("a grid needs `points: N` beside a continuous key, or a choice instead of it")
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        places = [ends[0] + (ends[1] - ends[0]) * i / (self.points - 1) for i in range(self.points)]
        inner = [math.exp(x) if self.log else x for x in places[1:-1]]
        return [self.low, *inner, self.high]

    def probes(self) -> list[Any]:
        return [self.low, self.high]

    def changes(self, key: str, value: Any) -> dict[str, Any]:
        return {key: value}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"int takes whole numbers, got {getattr(self, name)!r}")
        if not self.low < self.high or self.step < 1 or (self.high - self.low) % self.step:
            raise ValueError(
                f"the lower end must be below the upper one, and whole steps apart, got [{self.low}, {self.high}] in "
                f"steps of {self.step}"
            )

    def draw(self, trial: "optuna.Trial", key: str) -> int:
        return trial.suggest_int(key, self.low, self.high, step=self.step)

    def parameter(self, value: Any) -> int:
        return int(value)

    def shape(self) -> "optuna.distributions.BaseDistribution":
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, step=self.step)

    def grid(self) -> list[Any]:
        return list(range(self.low, self.high + 1, self.step))

    def probes(self) -> list[Any]:
        return [self.low, self.high]

    def changes(self, key: str, value: Any) -> dict[str, Any]:
        return {key: value}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]
    """As trials keep them: the names, where they have names."""
    meanings: Mapping[str, Any] = field(default_factory=dict)
    """Name -> value; empty for values without names."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a choice needs one or more values")
        told = [to_text(value) for value in self.values]
        if twice := sorted({text for text in told if told.count(text) > 1}):
            raise ValueError(f"a choice names {', '.join(twice)} twice")

    def draw(self, trial: "optuna.Trial", key: str) -> Any:
        drawn = trial.suggest_categorical(key, [to_text(value) for value in self.values])
        return next(value for value in self.values if to_text(value) == drawn)

    def parameter(self, value: Any) -> str:
        return to_text(value)

    def shape(self) -> "optuna.distributions.BaseDistribution":
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([to_text(value) for value in self.values])

    def grid(self) -> list[Any]:
        return list(self.values)

    def probes(self) -> list[Any]:
        return list(self.values)

    def changes(self, key: str, value: Any) -> dict[str, Any]:
        meant = self.meanings[value] if self.meanings else value
        return flatten({key: meant}) if isinstance(meant, Mapping) else {key: meant}


def read(words: Any) -> Distribution:
    """The distribution that a space's file names. Raises ConfigError that says what is wrong with it."""
    if not isinstance(words, Mapping) or sum(kind in words for kind in KINDS) != 1:
        raise ConfigError(f"expected one of {', '.join(KINDS)}, such as {{uniform: [0, 1]}}, got {words!r}")
    kind = next(kind for kind in KINDS if kind in words)
    more = {name: value for name, value in words.items() if name not in (kind, "when")}
    allowed = {"uniform": {"points"}, "loguniform": {"points"}, "int": {"step"}, "choice": set[str]()}[kind]
    if unknown := sorted(more.keys() - allowed):
        raise ConfigError(
            f"{kind} knows no {', '.join(map(repr, unknown))} (known here: {', '.join(sorted(allowed | {'when'}))})"
        )
    if words[kind] == REQUIRED:
        raise ConfigError(f"the space leaves this to you: {kind}=...")
    try:
        return _choice(words[kind]) if kind == "choice" else _ranged(kind, words[kind], more)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _ranged(kind: str, ends: Any, more: Mapping[str, Any]) -> Distribution:
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) in (int, float) for end in ends):
        raise ValueError(f"{kind} takes [lowest, highest], got {ends!r}")
    if kind == "int":
        return Whole(low=ends[0], high=ends[1], **more)
    points = more.get("points")
    if points is not None and type(points) is not int:
        raise ValueError(f"points is a whole number, got {points!r}")
    return Real(low=float(ends[0]), high=float(ends[1]), log=kind == "loguniform", points=points)


def _choice(given: Any) -> Choice:
    if isinstance(given, Mapping):
        return Choice(values=tuple(given), meanings=dict(given))
    if not isinstance(given, list):
        raise ValueError(f"choice takes a list of values, or name: value, got {given!r}")
    return Choice(values=tuple(given))
