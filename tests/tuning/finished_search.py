"""A search that looks like a finished one, drawn from formulas: for whoever reads stores. No run stands behind it."""

import math
import random
import statistics
from dataclasses import replace

from kd.evaluation.paired import interval, verdict
from tuning.trials import Conclusion, Contender, Found, Objective, Point, Search, Trial, better

STEPS, EVERY, GRACE = 600, 100, 200
NAME = "digits_scalekd"
KEYS = {
    "distill.scalekd.alpha": {"loguniform": [1e-4, 1e-1]},
    "distill.scalekd.gamma": {"uniform": [0.0, 0.1]},
    "distill.scalekd.csa.heads": {"choice": [1, 2, 4, 8]},
    "distill.scalekd.sdf.on": {"choice": ["c5", "pyramid"]},
    "distill.scalekd.sdf.width": {"int": [16, 96], "step": 16, "when": {"distill.scalekd.sdf.on": "pyramid"}},
}


def finished(*, trials: int = 16, seeds: int = 3, latency: bool = False) -> Found:
    """ASHA over ScaleKD's weights: stopped, failed and finished trials, the best two again on more seeds. `latency`: a
    second objective, ms_per_image."""
    objectives = (Objective(name="AP_small"), *((Objective(name="ms_per_image", goal="min"),) if latency else ()))
    search = Search(
        name=NAME, recipe=NAME, space="scalekd", keys=KEYS, objectives=objectives, searcher="tpe", stopping="asha",
        trials=trials, steps=STEPS, grace=GRACE, begun="2026-11-21T15:00:00+00:00", parent_run="f" * 32,
        tracking="sqlite:////nowhere/mlflow.db",
    )  # fmt: skip
    made: list[Trial] = []
    for number in range(trials):
        made.append(_searched(number, made, latency))
    chosen = better(objectives[0], [t for t in made if t.state == "finished"])[:2]
    for seed in range(seeds):
        made.append(_complete(len(made), "plain", {}, seed, f"{NAME}_plain_seed{seed}", 15.0, latency))
        for of in chosen if seed else []:
            run = f"{of.run}_seed{seed}"
            again = _complete(len(made), "again", of.settings, seed, run, _level(of.settings), latency)
            made.append(replace(again, of=of.number))
    return Found(search=search, trials=tuple(made), conclusion=_concluded(made, chosen, seeds))


def _searched(number: int, before: list[Trial], latency: bool) -> Trial:
    drawn = random.Random(number)
    settings = {
        "distill.scalekd.alpha": 10 ** drawn.uniform(-4, -1),
        "distill.scalekd.gamma": drawn.uniform(0, 0.1),
        "distill.scalekd.csa.heads": drawn.choice([1, 2, 4, 8]),
        "distill.scalekd.sdf.on": drawn.choice(["c5", "pyramid"]),
    }
    if settings["distill.scalekd.sdf.on"] == "pyramid":
        settings["distill.scalekd.sdf.width"] = drawn.randrange(16, 97, 16)
    run = f"{NAME}_trial{number:03d}"
    trial = _complete(number, "search", settings, 0, run, _level(settings), latency)
    if number == 5:
        return replace(trial, state="failed", curve=trial.curve[:1], facts={}, minutes=None, why="loss is not finite")
    first = len([p for p in trial.curve if p.step <= GRACE])
    rung = sorted(t.curve[first - 1].values["AP_small"] for t in before if len(t.curve) >= first)
    mine = trial.curve[first - 1].values["AP_small"]
    if len(rung) >= 3 and mine < rung[len(rung) * 2 // 3]:
        why = f"at step {GRACE} not among the best third"
        return replace(trial, state="stopped", curve=trial.curve[:first], facts={}, minutes=None, why=why)
    return trial


def _complete(number: int, role: str, settings: dict, seed: int, run: str, level: float, latency: bool) -> Trial:
    noise = random.Random(f"{run} {seed}")
    lift = noise.gauss(0, 0.4)
    cost = 0.11 if role == "plain" else 0.2 + 0.005 * settings["distill.scalekd.csa.heads"]
    curve = tuple(
        Point(
            step=step,
            values={"AP_small": (level + lift) * (1 - math.exp(-step / 200)) + noise.gauss(0, 0.15)},
            seconds=step * cost,
        )
        for step in range(EVERY, STEPS + 1, EVERY)
    )
    if latency:
        width = settings.get("distill.scalekd.sdf.width", 32)
        end = replace(curve[-1], values={**curve[-1].values, "ms_per_image": 20 + width / 8})
        curve = (*curve[:-1], end)
    return Trial(
        number=number, role=role, settings=settings, changes=settings, seed=seed, run=run, state="finished",
        curve=curve, starts=1, run_id=f"{number:032x}", minutes=STEPS * cost / 60 + 0.4,
        facts={**curve[-1].values, "AP": 1.2 * curve[-1].values["AP_small"], "parameters": 760_000.0},
    )  # fmt: skip  # pyright: ignore


def _level(settings: dict) -> float:
    """A landscape with one hill: alpha near 5e-3, two or four heads, the pyramid."""
    far = math.log10(settings["distill.scalekd.alpha"] / 5e-3)
    heads = {1: -1.0, 2: 0.0, 4: 0.3, 8: -0.6}[settings["distill.scalekd.csa.heads"]]
    return 19.0 - 1.5 * far**2 + heads + (1.0 if settings["distill.scalekd.sdf.on"] == "pyramid" else -2.0)


def _concluded(trials: list[Trial], chosen: list[Trial], seeds: int) -> Conclusion:
    plain = {t.seed: t.curve[-1].values["AP_small"] for t in trials if t.role == "plain"}
    told: list[Contender] = []
    for of in chosen:
        own = {t.seed: t.curve[-1].values["AP_small"] for t in trials if t is of or t.of == of.number}
        gains = [own[seed] - plain[seed] for seed in range(seeds)]
        low, high = interval(gains) or (None, None)
        told.append(
            Contender(
                number=of.number,
                seeds=tuple(range(seeds)),
                values=tuple(own[s] for s in range(seeds)),
                plain=tuple(plain[s] for s in range(seeds)),
                mean=statistics.mean(own.values()),
                difference=statistics.mean(gains),
                low=low,
                high=high,
                verdict=verdict(gains),
            )
        )
    told.sort(key=lambda one: -one.mean)
    return Conclusion(
        best=told[0].number,
        beats_plain=told[0].verdict == "better",
        sentence=f"trial {told[0].number} is {told[0].verdict} than the plain student",
        contenders=tuple(told),
    )
