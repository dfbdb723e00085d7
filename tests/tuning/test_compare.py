"""Runs out of a real MLflow store: what differs, paired differences where seeds match, curves; all mistakes at once."""

from pathlib import Path

import pytest
from PIL import Image

from cluster.grammar import ConfigError
from kd.evaluation.paired import interval
from tuning import compare, side_by_side
from tuning.tracked import Tracked, Tracker, tracker_of

PLAIN, TAUGHT = (20.0, 21.0, 22.0), (21.0, 22.5, 23.1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as runs keep it: two configurations on three seeds, a run that was killed, and a search's own run."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    folder = tmp_path_factory.mktemp("runs")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("minnow", artifact_location=(folder / "artifacts").as_uri())

    def run(name: str, seed: int, score: float, status: str, **settings: str) -> None:
        run_id = client.create_run(experiment, run_name=name).info.run_id
        shared = {"optim.lr": "0.001", "storage": "/somewhere", "resources.workers": str(seed + 1)}
        params = {"name": name, "seed": str(seed), **shared, **settings}
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in params.items()],
            metrics=[Metric("val/AP", score * part, 1000 * part, 100 * part) for part in (1, 2)]
            + [Metric("student/ms_per_image", 30.0 - score, 0, 200), Metric("val/AP_large", -1.0, 0, 200)],
        )
        client.set_terminated(run_id, status)

    for seed in range(3):
        run(f"plain{seed}", seed, PLAIN[seed], "FINISHED")
        run(f"taught{seed}", seed, TAUGHT[seed], "FINISHED", **{"distill.pkd.weight": "6"})
    run("stopped", 0, 5.0, "KILLED")
    client.create_run(experiment, run_name="a_search")
    return folder


def rows(storage: Path) -> list[side_by_side.Row]:
    return side_by_side.rows(tracker_of(None, storage).of_experiment("minnow"))


@pytest.mark.cluster
def test_runs_that_differ_by_their_seed_are_one_row(storage: Path) -> None:
    plain, taught = rows(storage)
    assert (plain.name, sorted(map(int, map(str, plain.runs)))) == ("plain0", [0, 1, 2])
    assert (plain.differs, taught.differs) == ({"distill.pkd.weight": "-"}, {"distill.pkd.weight": "6"})


@pytest.mark.cluster
def test_a_method_that_a_run_lacks_is_one_line() -> None:
    """And what differs between those that have it stays a line of its own."""
    method = {"distill.x.alpha": "1", "distill.x.beta": "2", "distill.x.sdf.on": "c5"}
    _, one, other = side_by_side.rows(
        [run("a", 0, 1.0), run("b", 0, 2.0, **method), run("c", 0, 3.0, **method | {"distill.x.alpha": "7"})]
    )
    assert one.differs == {"distill.x.alpha": "1", "distill.x": "as set"}
    assert other.differs == {"distill.x.alpha": "7", "distill.x": "as set"}


def test_differences_are_paired_by_seed(storage: Path) -> None:
    plain, taught = rows(storage)
    gains = [2 * (mine - base) for mine, base in zip(TAUGHT, PLAIN, strict=True)]
    gap = side_by_side.gap(taught, plain, "AP")
    assert gap is not None
    assert gap.mean == pytest.approx(sum(gains) / 3)
    assert (gap.low, gap.high) == pytest.approx(interval(gains))
    assert (gap.pairs, gap.verdict) == (3, "better")
    faster = side_by_side.gap(taught, plain, "ms_per_image")
    assert faster is not None
    assert faster.mean < 0
    assert faster.verdict == "better"
    assert side_by_side.gap(taught, plain, "AP_large") is None


@pytest.mark.cluster
def test_the_command_prints_one_table_and_draws_the_curves(
    storage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "curves.png"
    asked = ["--experiment", "minnow", "--storage", str(storage), "--png", str(png), "--metrics", "AP", "ms_per_image"]
    assert compare.main(asked) == 0
    told = capsys.readouterr().out
    assert "distill.pkd.weight 6" in told
    assert "+2.40" in told
    assert "left out: 1 killed" in told
    assert Image.open(png).size[0] > 800
    assert compare.main(["plain0", "taught1", "--base", "taught0", *asked[2:]]) == 0
    assert "to taught0, paired by seed" in capsys.readouterr().out


@pytest.mark.cluster
def test_a_curve_is_read_by_step(storage: Path) -> None:
    tracker = tracker_of(None, storage)
    (run,) = tracker.named(["plain1"])
    assert tracker.curve(run, "AP") == {100: 21.0, 200: 42.0}
    assert tracker.named([run.run_id, "plain1"]) == [run]


@pytest.mark.cluster
def test_all_runs_that_are_not_there_are_told_at_once(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = tracker_of(None, storage)
    with pytest.raises(ConfigError, match=r"2 run\(s\) not found\n  plian1.*did you mean 'plain1'\?\n  nothing"):
        tracker.named(["plain0", "plian1", "nothing"])
    with pytest.raises(ConfigError, match="did you mean 'minnow'"):
        tracker.of_experiment("minow")
    assert compare.main(["plain0", "--metrics", "AP_smal", "--storage", str(storage)]) == 2
    assert "no run has a metric 'AP_smal'" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["some", "--storage", str(tmp_path)]) == 2
    assert "--tracking" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert tracker_of("http://far:1", tmp_path) == Tracker(uri="http://far:1")


def test_nothing_asked_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([]) == 2
    assert "--experiment NAME" in capsys.readouterr().err


def run(name: str, seed: int | None, value: float, status: str = "FINISHED", **settings: str) -> Tracked:
    return Tracked(run_id=name, name=name, status=status, seed=seed, settings=settings, metrics={"val/AP": value})


def test_one_pair_says_nothing_and_no_pair_is_told() -> None:
    base, one, none = side_by_side.rows([run("a", 0, 1.0), run("b", 0, 2.0, lr="1"), run("c", 5, 9.0, lr="2")])
    gap = side_by_side.gap(one, base, "AP")
    assert gap is not None
    assert (gap.mean, gap.low, gap.verdict) == (1.0, None, "one pair says nothing")
    assert side_by_side.gap(none, base, "AP") is None
    assert [row["verdict"] for row in side_by_side.shown([base, one, none], ["AP"])][1:] == [gap.verdict, "no pair"]


def test_of_two_runs_with_one_seed_the_last_counts_and_unfinished_ones_do_not() -> None:
    (row,) = side_by_side.rows([run("a", 0, 1.0), run("b", 0, 2.0), run("c", 0, 3.0, "RUNNING")])
    assert [one.name for one in row.runs.values()] == ["b"]


def test_runs_without_a_seed_are_in_no_pair() -> None:
    base, other = side_by_side.rows([run("a", None, 1.0), run("b", None, 2.0, lr="1")])
    assert side_by_side.gap(other, base, "AP") is None
