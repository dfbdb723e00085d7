"""A comparison is checked whole before it starts, goes in rounds, does nothing twice, and tells what pairs can say."""

import csv
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster import build, config
from cluster.compare_methods import main
from cluster.comparison import comparing
from cluster.comparison import table as comparison_table
from cluster.comparison.plan import PLAIN, REFERENCES, Plan, Row, Wanted, make_plan, shipped
from cluster.comparison.runs import Runs, config_of, numbers, require_same_settings
from cluster.comparison.store import Store
from cluster.config import RunConfig
from cluster.grammar import ConfigError, parse
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher

TEACHER = {"teachers.0.weights": "runs/digits_teacher/student", "views.flip": 0.5, "optim.steps": 100}
SECONDS = {PLAIN: 10.0, "fitnet": 12.0, "cwd": 15.0}


def base(storage: Path, **more: Any) -> RunConfig:
    return config.load("digits_scalekd", TEACHER | {"storage": str(storage)} | more)


def planned(storage: Path, rows: str | None = None, changes: Mapping[str, Any] | None = None, **wanted: Any) -> Plan:
    if rows is not None:
        path = storage / "rows.yaml"
        path.write_text(rows)
        wanted["rows"] = path
    return make_plan(config, base(storage, **(changes or {})), Wanted(**wanted))


def names(plan: Plan) -> list[str]:
    return [row.name for row in plan.rows]


# What is trained


def test_without_methods_the_recipes_own_are_compared(tmp_path: Path) -> None:
    assert names(planned(tmp_path, references=())) == [PLAIN, "scalekd"]
    assert names(planned(tmp_path)) == [PLAIN, "scalekd", *REFERENCES.values()]
    with pytest.raises(ConfigError, match="nothing to compare: name methods with --methods"):
        planned(tmp_path, changes={"distill": {}})


def test_a_row_lies_over_the_recipes_own_section_and_touches_nothing_else(tmp_path: Path) -> None:
    text = "sdf: {scalekd: {beta: 0.0, gamma: 0.0}}\nsoft: {fitnet: {weight: 0.5}, cwd: {}}"
    plan = planned(tmp_path, text, methods=("soft", "sdf", "pkd"), references=())
    assert names(plan) == [PLAIN, "soft", "sdf", "pkd"]
    plain, soft, sdf, pkd = (config_of(plan, row, 0, {}) for row in plan.rows)
    assert (plain.distill, plain.teachers) == ({}, ())
    assert (soft.distill["fitnet"].weight, set(soft.distill)) == (0.5, {"fitnet", "cwd"})
    own = base(tmp_path).distill["scalekd"]
    assert sdf.distill["scalekd"].sdf == own.sdf  # pyright: ignore[reportAttributeAccessIssue]
    assert (sdf.distill["scalekd"].beta, sdf.distill["scalekd"].gamma) == (0.0, 0.0)  # pyright: ignore
    assert set(pkd.distill) == {"pkd"}
    for one in (plain, soft, sdf, pkd):
        assert (one.optim, one.views, one.student, one.order) == (plain.optim, plain.views, plain.student, plain.order)


def test_the_plain_student_at_twice_the_input_is_evaluated_there_too(tmp_path: Path) -> None:
    plan = planned(tmp_path, references=("double",))
    once, double = (config_of(plan, row, 0, {}) for row in plan.rows if row.kind in ("plain", "double"))
    assert double.views.short_side == tuple(2 * side for side in once.views.short_side or ())
    assert double.views.buckets == tuple((2 * h, 2 * w) for h, w in once.views.buckets)
    assert config.evaluation_views(double).buckets == double.views.buckets
    written = {"evaluation.views": {"short_side": 64, "buckets": [[128, 128]]}}
    (double,) = [r for r in planned(tmp_path, changes=written, references=("double",)).rows if r.kind == "double"]
    assert double.tree["evaluation"]["views"] == {"short_side": 128, "long_side": 2666, "buckets": [[256, 256]]}


def test_a_reference_that_means_nothing_is_left_out_and_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, changes={"views.flip": 0.0, "views.short_side": None})
    assert names(plan) == [PLAIN, "scalekd", REFERENCES["equal_time"]]
    assert [note.split()[0] for note in plan.notes] == [REFERENCES["fresh"], REFERENCES["double"]]


def test_all_mistakes_are_one_message_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.yaml"
    rows.write_text("plain: {fitnet: {}}\nempty: {}\nweak: {fitnet: {wieght: 1}}\nlow: {cwd: {temperature: 0.0}}")
    words = ["digits_scalekd", "teachers.0.weights=x", "--rows", str(rows), "--methods", "weak,fitnt,low"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "'plain' cannot name a row" in told
    assert "row empty is `method: settings`" in told
    assert "no row and no method 'fitnt'; did you mean 'fitnet'?" in told
    assert "row weak: 1 mistake(s)\n  distill.fitnet.wieght: no such setting; did you mean 'weight'?" in told
    assert "distill.cwd: temperature must be > 0, got 0.0" in told
    for wrong, match in (
        (["--seeds", "0"], "--seeds: 1 to 10"),
        (["--references", "freesh"], "no freesh; known: equal_time, fresh, double, or none"),
        (["--rows", "no_such"], "no file of rows 'no_such'"),
    ):
        assert main(["digits_scalekd", "teachers.0.weights=x", *wrong]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize("path", shipped().values(), ids=shipped().keys())
def test_shipped_rows_are_sound(path: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path, rows=path.read_text())
    assert set(parse(path.read_text(), path.name)) <= set(names(plan))


def test_one_cache_serves_all_rows(tmp_path: Path) -> None:
    """The key is that of all taps that any row reads, and no row's run becomes another one by it."""
    plan = planned(tmp_path, methods=("fitnet", "scalekd"), references=())
    stores = {"teachers.0.stores": ["c5", "pyramid"]}
    fitnet, scalekd = (config_of(plan, row, 0, {}, stores) for row in plan.rows[1:])
    assert build.stored_of(fitnet, fitnet.teachers[0]) == build.stored_of(scalekd, scalekd.teachers[0])
    assert build.reads_of(fitnet) == {"pyramid"}
    alone = config_of(plan, plan.rows[1], 0, {})
    assert build.stored_of(alone, alone.teachers[0]) == {"pyramid"}
    assert config.difference(alone, fitnet) == []
    assert config.config_hash(alone) == config.config_hash(fitnet)


# Rounds, interruptions and failures


class Trainer:
    """Leaves what `cluster.training.train` leaves, at once. Counts; may be killed, or find a method that diverges."""

    def __init__(self, killed_after: int | None = None, broken: str | None = None) -> None:
        self.done: list[tuple[str, int]] = []
        self.configs: dict[str, RunConfig] = {}
        self._killed_after, self._broken = killed_after, broken

    def __call__(self, config: RunConfig, row: Row) -> dict[str, Any]:
        if len(self.done) == self._killed_after:
            raise KeyboardInterrupt
        if row.name == self._broken:
            raise ConfigError("it diverged")
        self.done.append((row.name, config.seed))
        self.configs[config.name] = config
        log = Path(config.storage) / config.name / "metrics.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        spent = SECONDS.get(row.name, 10.0) / 100
        entry = {"time/step_s": 2 * spent, "time/cpu_s": spent, "loss/total": 1.0, f"share/{row.name}/feat": 0.25}
        log.write_text("".join(json.dumps({"t": 0, "s": s, "m": entry}) + "\n" for s in range(4)))
        ap = 20.0 + (1.0 if row.name == "cwd" else 0.0) + config.seed / 10
        return {
            "metrics": {"AP": ap, "AP_small": ap, "AP_medium": ap}, "minutes": 1.0, "run_id": "0", "device": "cpu",
            "memory_bytes": 1000,
        }  # fmt: skip


def begun(plan: Plan, train: Callable[..., Any]) -> Runs:
    plan.folder.mkdir(parents=True, exist_ok=True)
    store = Store(plan.folder / "comparison.json")
    return Runs(plan=plan, store=store, train=train, fresh_views=lambda: 7, stores={}, say=lambda text: None)


def quietly() -> None:
    return


def test_seeds_go_in_rounds_and_budgets_are_settled_once(tmp_path: Path) -> None:
    plan, trainer, tables = planned(tmp_path, methods=("fitnet", "cwd"), seeds=2), Trainer(), []
    runs = begun(plan, trainer)
    assert runs.go(lambda: tables.append(len(runs.store.runs()))) == {}
    order = [PLAIN, "fitnet", "cwd", "plain_equal_time", "plain_fresh_views", "plain_2x_input"]
    assert trainer.done == [(name, seed) for seed in (0, 1) for name in order]
    assert tables == [6, 12]
    for seed in (0, 1):
        assert trainer.configs[f"digits_scalekd_plain_equal_time_seed{seed}"].optim.steps == 150
        assert trainer.configs[f"digits_scalekd_plain_fresh_views_seed{seed}"].views.count == 7
    assert runs.store.read()["facts"]["equal_time"] == {"steps": 150, "row": "cwd", "times": 1.5}


@pytest.mark.parametrize("killed_after", [0, 1, 2, 5])
def test_killed_and_begun_again_everything_is_done_once(tmp_path: Path, killed_after: int) -> None:
    plan, first, second = planned(tmp_path, methods=("fitnet", "cwd"), seeds=1), Trainer(killed_after), Trainer()
    with pytest.raises(KeyboardInterrupt):
        begun(plan, first).go(quietly)
    begun(plan, second).go(quietly)
    assert first.done + second.done == list((row.name, seed) for row, seed in plan.rounds())
    again = Trainer()
    runs = begun(plan, again)
    assert (runs.left(), runs.go(quietly), again.done) == ([], {}, [])
    assert len(runs.store.runs()) == 6


def test_more_rows_and_seeds_come_to_what_is_done(tmp_path: Path) -> None:
    begun(planned(tmp_path, methods=("fitnet",), references=(), seeds=1), Trainer()).go(quietly)
    more = Trainer()
    begun(planned(tmp_path, methods=("fitnet", "cwd"), references=(), seeds=2), more).go(quietly)
    assert more.done == [("cwd", 0), (PLAIN, 1), ("fitnet", 1), ("cwd", 1)]


def test_a_row_that_fails_does_not_hold_up_the_others_and_is_tried_again(tmp_path: Path) -> None:
    plan, trainer = planned(tmp_path, methods=("fitnet", "cwd"), references=(), seeds=2), Trainer(broken="fitnet")
    assert begun(plan, trainer).go(quietly) == {"fitnet": "it diverged"}
    assert trainer.done == [(PLAIN, 0), ("cwd", 0), (PLAIN, 1), ("cwd", 1)]
    again = Trainer()
    begun(plan, again).go(quietly)
    assert again.done == [("fitnet", 0), ("fitnet", 1)]
    with pytest.raises(ConfigError, match="it diverged"):
        begun(planned(tmp_path, changes={"name": "other"}), Trainer(broken=PLAIN)).go(quietly)


def test_runs_of_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods=("fitnet",), seeds=1)
    begun(plan, Trainer()).go(quietly)
    store = begun(plan, Trainer()).store
    require_same_settings(plan, store)
    for changes, runs in (({"distill.fitnet.weight": 3.0}, 1), ({"optim.lr": 0.5}, 5), ({"resources.threads": 1}, 0)):
        other = planned(tmp_path, changes=changes, methods=("fitnet",), seeds=1)
        if runs:
            with pytest.raises(ConfigError, match=rf"holds {runs} run\(s\) of other settings"):
                require_same_settings(other, store)
        else:
            require_same_settings(other, store)


def test_runs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "comparison.json")
    store.require_teachers({"big": "a" * 64})
    store.require_teachers({"big": "a" * 64})
    with pytest.raises(ConfigError, match=r"big: aaaaaaaaaaaa -> bbbbbbbbbbbb.*put the teacher back"):
        store.require_teachers({"big": "b" * 64})


def test_a_store_keeps_a_row_and_a_seed_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "comparison.json")
    assert (store.runs(), store.find(PLAIN, 0)) == ([], None)
    store.add({"row": PLAIN, "seed": 0})
    with pytest.raises(ValueError, match="plain, seed 0 is stored already"):
        store.add({"row": PLAIN, "seed": 0})
    assert (store.settle("views", 3), store.settle("views", 4)) == (3, 3)


@pytest.mark.cluster
def test_all_of_it_but_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, pairs that fit, one record in MLflow with table and plot, and a second start that adds a row."""
    from mlflow import MlflowClient

    changes = SMALL | {"teachers.0.weights": str(save_teacher(tmp_path / "weights"))}
    changes |= {"distill.scalekd.sdf": {"width": 16, "token_width": 16}, "distill.scalekd.csa": {"heads": 2}}
    tags: list[dict[str, str]] = []
    trainer = Trainer()

    def trained(config: RunConfig, further_tags: dict[str, str]) -> dict[str, Any]:
        tags.append(further_tags)
        (row,) = [row for row in plan.rows if row.name == further_tags["comparison.row"]]
        return trainer(config, row)

    monkeypatch.setattr(comparing, "train", trained)
    monkeypatch.setattr(comparing, "ray_started", nullcontext)
    monkeypatch.setattr(comparing, "require_good_teachers", lambda config: {"teacher": {"own": 9.0, "student": 4.0}})
    for methods in (("scalekd",), ("scalekd", "cwd")):
        plan = planned(tmp_path, changes=changes, methods=methods, references=("fresh",), seeds=2)
        assert comparing.compare(plan, base(tmp_path, **changes)) == {}
    assert trainer.done[:3] == [(PLAIN, 0), ("scalekd", 0), ("plain_fresh_views", 0)]
    assert trainer.done[6:] == [("cwd", 0), ("cwd", 1)]
    # Both rows read from a cache of what either reads; eight images are one step, so that 100 steps need 100 views.
    assert trainer.configs["digits_scalekd_cwd_seed0"].teachers[0].stores == ("c5", "pyramid")
    assert trainer.configs["digits_scalekd_plain_fresh_views_seed1"].views.count == 100

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (parent,) = client.search_runs(["1"])
    assert {one["mlflow.parentRunId"] for one in tags} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert kept >= {"comparison.csv", "comparison.png", "comparison.json", "recipe.yaml"}
    assert parent.data.metrics["difference/cwd"] == pytest.approx(1.0)


def test_a_row_that_cannot_go_with_the_pair_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SMALL | {"teachers.0.weights": str(save_teacher(tmp_path / "weights"))}
    changes |= {"optim.accumulate": 2}
    plan = planned(tmp_path, changes=changes, methods=("fitnet", "pkd"), references=(), seeds=1)
    monkeypatch.setattr(comparing, "ray_started", nullcontext)
    with pytest.raises(ConfigError, match=r"^row pkd: teachers: 'teacher' .* 2 accumulated micro-batches"):
        comparing.compare(plan, base(tmp_path, **changes))


# The table


def stored(row: str, seed: int, ap: float, spent: float = 10.0, memory: int | None = 1000) -> dict[str, Any]:
    scores = {"AP": ap, "AP_small": ap - 1, "AP_medium": -1.0}
    times = {"seconds": 99.0, "cpu_seconds": spent, "device": "cpu", "memory_bytes": memory}
    return {"row": row, "seed": seed, "metrics": scores, **times}


def test_a_table_of_nothing_is_empty() -> None:
    assert comparison_table.rows([]) == []


def test_pairs_and_their_interval() -> None:
    gains = (1.0, 2.0, 3.0)
    runs = [stored(PLAIN, seed, 20 + seed) for seed in range(4)]
    runs += [stored("fitnet", seed, 20 + seed + gain, 15.0, 3000) for seed, gain in enumerate(gains)]
    plain, fitnet = comparison_table.rows(runs)
    assert (plain["difference"], plain["verdict"], plain["seeds"]) == (None, None, 4)
    # Mean 2, deviation 1, t = 4.303 with two degrees of freedom, over the root of 3.
    assert (fitnet["difference"], fitnet["low"]) == (pytest.approx(2.0), pytest.approx(2 - 4.303 / 3**0.5))
    assert (fitnet["seeds"], fitnet["extra_time"], fitnet["extra_bytes"]) == (3, pytest.approx(0.5), 2000)
    assert fitnet["verdict"] == "no difference"
    words = comparison_table.shown([plain, fitnet])[1]
    assert words["difference"] == "+2.00"
    assert words["95 % interval"] == "[-0.48, +4.48]"
    assert (words["extra time"], words["AP_medium"], words["verdict"]) == ("+50%", "-", "no difference")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [((1.0,), "one pair says nothing"), ((1.0, 1.1, 0.9), "better"), ((-1.0, -1.1, -0.9), "worse")],
)
def test_verdicts(gains: tuple[float, ...], verdict: str) -> None:
    runs = [stored(PLAIN, seed, 20.0) for seed in range(len(gains))]
    runs += [stored("cwd", seed, 20.0 + gain, memory=None) for seed, gain in enumerate(gains)]
    found = comparison_table.rows(runs)[1]
    assert (found["verdict"], found["extra_bytes"]) == (verdict, None)


def test_a_row_without_its_pair_claims_nothing() -> None:
    (row,) = comparison_table.rows([stored("cwd", 0, 30.0)])
    assert (row["difference"], row["verdict"], row["extra_time"]) == (None, None, None)


def test_csv_and_plot_hold_the_table(tmp_path: Path) -> None:
    runs = [stored(PLAIN, s, 20.0) for s in (0, 1)] + [stored("cwd", s, 21.0 + s / 10) for s in (0, 1)]
    rows = comparison_table.rows(runs)
    with comparison_table.write_csv(rows, tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["row"] for row in read] == [PLAIN, "cwd"]
    assert float(read[1]["difference"]) == pytest.approx(1.05)
    assert comparison_table.write_plot(rows, "title", tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_a_run_are_of_its_steps_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path, methods=("cwd",), references=())
    row, trainer = plan.rows[1], Trainer()
    made = config_of(plan, row, 0, {})
    found = numbers(made, row, trainer(made, row))
    assert (found["cpu_seconds"], found["seconds"]) == (pytest.approx(15.0), pytest.approx(30.0))
    assert found["shares"] == {"cwd/feat": 0.25}
