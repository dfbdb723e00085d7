"""The whole job on built-in data: a teacher at twice the resolution, the student alone and distilled, one table."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import RunConfig

SEEDS = (0, 1)
LEAST_LEAD = 5.0
"""AP by which the teacher must beat the student alone, or there is nothing to distil."""
ALONE, DISTILLED, TEACHER = "digits_student", "digits_scalekd", "digits_teacher"


def main(storage: str) -> int:
    """Run it all below `storage`; run again, it goes on where it was. The exit code is 1 for a useless teacher."""
    import time

    from cluster.config import load
    from cluster.driver import ray_started, say
    from cluster.training import train

    began = time.perf_counter()
    with ray_started():
        say("1/3 the teacher, at twice the student's resolution")
        teacher = train(load(TEACHER, {"storage": storage}))
        say("2/3 the student alone")
        alone = [train(_seeded(ALONE, seed, {"storage": storage})) for seed in SEEDS]
        lead = _ap(teacher) - sum(map(_ap, alone)) / len(alone)
        if lead < LEAST_LEAD:
            say(
                f"The teacher is only {lead:.1f} AP better than the student alone ({_ap(teacher):.1f}); a teacher must "
                f"lead by {LEAST_LEAD:g} to be worth learning from, so the demo stops here."
            )
            return 1
        say(f"    the teacher leads by {lead:.1f} AP")
        say("3/3 the student with ScaleKD, same images, views and steps")
        taught = {"storage": storage, "teachers.0.weights": teacher["student"]}
        distilled = [train(_seeded(DISTILLED, seed, taught)) for seed in SEEDS]
    _show(storage, teacher, alone, distilled, (time.perf_counter() - began) / 60)
    return 0


def _seeded(recipe: str, seed: int, settings: dict[str, Any]) -> "RunConfig":
    from cluster.config import load

    return load(recipe, {"name": f"{recipe}_seed{seed}", "seed": seed, **settings})


def _ap(result: dict[str, Any]) -> float:
    return result["metrics"]["AP"]


def _show(
    storage: str, teacher: dict[str, Any], alone: list[dict[str, Any]], distilled: list[dict[str, Any]], minutes: float
) -> None:
    from pathlib import Path

    from cluster.build import split_folder
    from cluster.pictures import beside_truth, read_results
    from cluster.results import DETECTIONS
    from cluster.terminal import table
    from data_sharding.shards import PackedDataset

    gains = [_ap(d) - _ap(a) for a, d in zip(alone, distilled, strict=True)]
    word = verdict(gains, [_ap(a) for a in alone])
    table(
        f"digits, {len(SEEDS)} seeds",
        [
            _row("teacher, 2x pixels", [teacher], "-"),
            _row("student alone", alone, "-"),
            _row("student with ScaleKD", distilled, word),
        ],
    )
    say = sys.stdout.write
    say(f"ScaleKD against the student alone, seed by seed: {', '.join(f'{g:+.2f} AP' for g in gains)}.\n")
    say("Better or worse: on every seed, and on average by more than the seeds of the student alone differ.\n")
    root = Path(storage).resolve()
    dataset = PackedDataset.open(split_folder(_seeded(ALONE, SEEDS[0], {"storage": str(root)}), "val"))
    columns = {
        title: read_results(root / f"{recipe}_seed{SEEDS[0]}" / DETECTIONS, dataset)
        for title, recipe in (("student alone", ALONE), ("student with ScaleKD", DISTILLED))
    }
    say(f"picture: {beside_truth(dataset, columns, root / 'demo.png')}\n")
    say(f"runs:    {root / 'mlflow.db'}\n")
    say(f"open:    .venv/bin/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///{root / 'mlflow.db'}\n")
    say(f"all in {minutes:.1f} minutes\n")


def _row(name: str, results: list[dict[str, Any]], word: str) -> dict[str, object]:
    def mean(of: list[float]) -> float:
        return sum(of) / len(of)

    return {
        "": name,
        **{key: f"{mean([r['metrics'][key] for r in results]):.1f}" for key in ("AP", "AP50", "AP_small")},
        "parameters": f"{results[0]['parameters'] / 1e6:.2f} M",
        "ms per image": f"{mean([r['ms_per_image'] for r in results]):.1f}",
        "minutes": f"{mean([r['minutes'] for r in results]):.1f}",
        "verdict": word,
    }


def verdict(gains: list[float], alone: list[float]) -> str:
    """What a few seeds can say: `gains` are paired differences, `alone` the plain student's AP per seed."""
    mean, spread = sum(gains) / len(gains), max(alone) - min(alone)
    if abs(mean) <= spread or min(gains) * max(gains) <= 0:
        return "no difference"
    return "better" if mean > 0 else "worse"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__)
    parser.add_argument("--storage", default="runs/demo", help="folder for everything the demo makes")
    sys.exit(main(parser.parse_args().storage))
