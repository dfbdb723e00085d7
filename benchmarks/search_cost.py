"""What a search costs until it has found what the whole grid would have found.

A grid of 24 points over ScaleKD's alpha, beta, gamma and heads on the two-core HIT-UAV recipe is run once to the end,
by `tuning.search` itself, and continued by the same command; its curves are kept in the results. Then every searcher is
replayed 200 times on these curves, with and without ASHA, with no training: the share of the grid's training time until
a trial within 1 % of the best AP_small had run to its end. Settings are drawn from the grid's points; one that is drawn
again is paid again, as a search would. Beside it stands how far seeds alone part.

    python -m benchmarks.search_cost              # about two hours; then the replays
    python -m benchmarks.search_cost --real       # one search by TPE with ASHA, as a check
    python -m benchmarks.search_cost --show       # the replays of what is stored
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import search_replay
from benchmarks.search_replay import Recorded
from cluster.grammar import ConfigError
from cluster.grammar import find as find_recipe
from data_sharding.files import write_atomically
from tuning import space as spaces
from tuning.findings import noise, own_seconds, plain_values, progress
from tuning.trial_store import from_tree, store_of, to_tree
from tuning.trials import Found

ROOT = Path(__file__).parent.parent
RECIPE, SPACE = "hit_uav_two_core", Path(__file__).parent / "search_space.yaml"
GRID, REAL = "search_cost_grid", "search_cost_asha"
ASHA = {"search.searcher": "tpe", "search.stopping": "asha", "search.trials": 24, "search.seeds": 1}
GOAL = 0.25
"""The median share of the grid that the best searcher may cost."""


def main() -> int:
    """The command line."""
    options = _options()
    if not options.show:
        code = searched(options, REAL, ASHA) if options.real else searched(options, GRID, {})
        if code:
            return code
    if not options.results.is_file():
        raise ConfigError(f"{options.results} is not there yet; run the command without --show first")
    report(json.loads(options.results.read_text()), options.replays)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument("--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth")
    parser.add_argument(
        "--teacher", type=Path, help="a student folder of hit_uav_two_core_teacher; else one is trained"
    )
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "search_cost")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "search_cost.json")
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--real", action="store_true", help="one real search by TPE with ASHA over the same points")
    parser.add_argument("--show", action="store_true", help="replay what is stored and train nothing")
    return parser.parse_args()


def searched(options: argparse.Namespace, name: str, more: Mapping[str, Any]) -> int:
    """Run a search, or what is left of it; what it has found so far goes into the results, however it ends."""
    from cluster import config
    from tuning.plan import make_plan
    from tuning.searching import search

    given = settings(options) | {"search.name": name} | dict(more)
    plan = make_plan(config, find_recipe(RECIPE), SPACE, given)
    asha = make_plan(config, find_recipe(RECIPE), SPACE, given | ASHA)
    try:
        return search(plan)
    finally:
        store = store_of(plan.folder)
        if store.exists():
            facts = {"rungs": list(asha.timing.rungs), "keep": asha.options.keep}
            keep(options.results, name, {**facts, "found": to_tree(anonymous(store.read()))})


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's settings that only this machine knows. Trains the teacher where there is none."""
    paths: dict[str, Any] = {"storage": str(options.storage), "student.backbone.weights": str(options.weights)}
    for split in ("train", "val"):
        paths[f"data.{split}.images"] = str(options.data / "normal_json" / split)
        paths[f"data.{split}.annotations"] = str(options.data / "coco" / f"instances_{split}.json")
    teacher = options.teacher or options.storage / f"{RECIPE}_teacher" / "student"
    if not (teacher / "student.json").is_file():
        from cluster.config import load
        from cluster.training import train

        train(load(find_recipe(f"{RECIPE}_teacher"), paths))
    return paths | {"teachers.0.weights": str(teacher)}


def anonymous(found: Found) -> Found:
    """Without what is this machine's alone: addresses and checkpoints."""
    trials = tuple(replace(trial, checkpoint="", run_id=None) for trial in found.trials)
    return replace(found, search=replace(found.search, tracking="", parent_run=""), trials=trials)


def keep(path: Path, name: str, content: Mapping[str, Any]) -> None:
    """Replace one search in the results."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**old, name: content}, indent=1) + "\n").encode())


def recorded(content: Mapping[str, Any]) -> Recorded:
    """The grid out of the results. ConfigError while points are missing."""
    stored = content[GRID]
    found = from_tree(stored["found"])
    space, wrong = spaces.load(SPACE, {})
    done = tuple(trial for trial in found.of_role("search") if trial.state == "finished")
    points = len(space.grid())
    if wrong or len(done) < points:
        told = "; ".join([f"{len(done)} of {points} points are recorded, the same command goes on", *wrong])
        raise ConfigError(f"nothing to replay yet: {told}")
    return Recorded(
        space=space,
        objective=found.search.objectives[0],
        trials=done,
        rungs=tuple(stored["rungs"]),
        keep=stored["keep"],
    )


def report(content: Mapping[str, Any], replays: int) -> None:
    """Print what replays cost, what seeds alone do, and the real search beside it."""
    grid = recorded(content)
    found = from_tree(content[GRID]["found"])
    name = grid.objective.name
    good = sum(grid.good(trial) for trial in grid.trials)
    ends = sorted(grid.end(trial) for trial in grid.trials)
    print(
        f"grid: {len(ends)} points, {grid.whole / 60:.0f} minutes of training, {name} {ends[0]:.2f} to {ends[-1]:.2f}"
    )
    print(
        f"within {search_replay.NEAR:.0%} of the best ({search_replay.NEAR * abs(grid.best):.2f} {name}): {good} points"
    )
    between = noise(found)
    if between is not None:
        print(f"seeds alone: standard deviation {between.deviation:.2f} {name}, {between.freedom} degrees of freedom")
    if plain := plain_values(found):
        print(f"plain student: {sum(plain) / len(plain):.2f} over {len(plain)} seed(s)")
    if found.conclusion is not None:
        print(f"the grid's winner on further seeds: {found.conclusion.sentence}")
    print(f"\ncost in shares of the grid's training time, {replays} replays; ASHA looks at steps {list(grid.rungs)}")
    costs = [search_replay.cost(grid, n, make, replays) for n, make in search_replay.contestants(grid).items()]
    print(search_replay.table(grid, costs))
    best = min(costs, key=lambda one: one.median)
    word = "reached" if best.median <= GOAL else "missed"
    print(f"goal, a median of {GOAL:.2f} at most: {word} ({best.name}: {search_replay.share(best.median)})")
    if REAL in content:
        print(real(from_tree(content[REAL]["found"]), grid))


def real(found: Found, grid: Recorded) -> str:
    """What the real search cost until it was as near, and whether its runs are the recorded ones."""
    at = next((s for s in progress(found) if s.trial.state == "finished" and near(s.best, grid)), None)
    cost = sum(own_seconds(trial, found.trials) for trial in found.of_role("search", "warmup"))
    told = "never" if at is None else f"after {at.seconds / grid.whole:.2f} of the grid's training time"
    ends = {json.dumps(dict(t.settings), sort_keys=True): grid.end(t) for t in grid.trials}
    same = [
        abs(ends[json.dumps(dict(t.settings), sort_keys=True)] - grid.end(t))
        for t in found.of_role("search")
        if t.state == "finished"
    ]
    apart = f"its {len(same)} finished trials part from the recorded ones by {max(same, default=0.0):.2f} at most"
    return f"real search (TPE with ASHA): near the best {told}; all of it cost {cost / grid.whole:.2f}; {apart}"


def near(value: float | None, grid: Recorded) -> bool:
    """Whether a value is as near the grid's best as a replay asks."""
    return value is not None and grid.objective.sign * (grid.best - value) <= search_replay.NEAR * abs(grid.best)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"{error}")
