"""What a person sees of a search while it runs."""

from pathlib import Path

from tests.tuning.finished_search import finished
from tests.tuning.test_desk import plan
from tuning.board import Board
from tuning.trials import Found, Trial


def trial(number: int, role: str) -> Trial:
    run = f"run{number}"
    return Trial(number=number, role=role, settings={}, changes={}, seed=0, run=run, state="finished")  # pyright: ignore


def test_shared_warm_ups_count_among_all_runs(tmp_path: Path) -> None:
    """Three trials, the plain student on two seeds, the best one on a further seed, and the warm-up before them."""
    trials = (trial(0, "warmup"), *(trial(n, "search") for n in (1, 2, 3)))
    told = Board(plan(tmp_path), Found(search=finished(trials=3).search, trials=trials)).line()
    assert "4 finished of 7;" in told
    assert "4 finished of 6;" in Board(plan(tmp_path), Found(search=finished(trials=3).search, trials=(
        trial(0, "plain"), *trials[1:]
    ))).line()  # fmt: skip
