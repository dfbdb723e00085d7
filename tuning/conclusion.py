"""Who won: the configurations that were looked at again, each over its seeds against the plain student on the same."""

import statistics
from collections.abc import Mapping, Sequence

from kd.evaluation.paired import interval, verdict
from tuning.trials import Conclusion, Contender, Found, Objective, Trial


def conclude(found: Found, chosen: Sequence[Trial]) -> Conclusion | None:
    """The answer so far; None while no configuration has a value. `chosen`: those that were to be looked at again."""
    objective = found.search.objectives[0]
    plain = _by_seed(found.of_role("plain"), objective)
    told = [_contender(found, of, plain, objective) for of in chosen]
    contenders = sorted((one for one in told if one is not None), key=lambda one: -objective.sign * one.mean)
    if not contenders:
        return None
    best = contenders[0]
    beats = best.verdict == "better"
    return Conclusion(
        best=best.number, beats_plain=beats, sentence=_sentence(best, objective), contenders=tuple(contenders)
    )


def _contender(found: Found, of: Trial, plain: Mapping[int, float], objective: Objective) -> Contender | None:
    own = _by_seed([of, *(t for t in found.of_role("again") if t.of == of.number)], objective)
    if not own:
        return None
    paired = sorted(own.keys() & plain.keys())
    gains = [objective.sign * (own[seed] - plain[seed]) for seed in paired]
    low, high = interval(gains) or (None, None)
    return Contender(
        number=of.number,
        seeds=tuple(sorted(own)),
        values=tuple(own[seed] for seed in sorted(own)),
        plain=tuple(plain[seed] for seed in paired),
        mean=statistics.mean(own.values()),
        difference=statistics.mean(gains) if gains else 0.0,
        low=low,
        high=high,
        verdict=verdict(gains),
    )


def _by_seed(trials: Sequence[Trial], objective: Objective) -> dict[int, float]:
    valued = {t.seed: t.value(objective.name) for t in trials if t.state == "finished"}
    return {seed: value for seed, value in valued.items() if value is not None}


def _sentence(best: Contender, objective: Objective) -> str:
    told = f"trial {best.number} has the best mean {objective.name}, {best.mean:.2f} over {len(best.seeds)} seed(s)"
    if best.low is None or best.high is None:
        return f"{told}; nothing is said about luck: {best.verdict}"
    against = f"{best.difference:+.2f} against the plain student, 95 % interval [{best.low:+.2f}, {best.high:+.2f}]"
    if best.verdict == "better":
        return f"{told}, {against}: better than the plain student"
    return f"{told}, {against}: nothing here beats the noise between seeds; keep the plain student, or run more seeds"
