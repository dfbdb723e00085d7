"""The report of a search says what its store holds, tells luck from effect, and is one page that asks for nothing."""

import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cluster.grammar import ConfigError
from kd.evaluation.paired import interval
from tests.tuning.finished_search import NAME, finished
from tuning import findings, report, reporting, response
from tuning.importance import importances
from tuning.trial_store import store_of
from tuning.trials import Found, Objective, Point, Trial


class Page(HTMLParser):
    """The tags, the addresses and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path, found: Found) -> Page:
    store_of(folder).write(found)
    files = reporting.write(folder)
    assert all(path.is_file() for path in files)
    assert {path.name for path in folder.glob("*.png")} == {path.name for path in files[1:]}
    return Page(files[0])


def test_the_page_holds_its_answer_and_asks_for_nothing(tmp_path: Path) -> None:
    found = finished(latency=True)
    page = written(tmp_path, found)
    assert found.conclusion is not None
    assert found.conclusion.sentence[1:] in page.text
    assert "loss is not finite" in page.text
    assert "script" not in page.tags
    assert page.tags.count("img") == 6 + len(found.search.keys)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "://" not in (tmp_path / reporting.PAGE).read_text()


@pytest.mark.parametrize("trials", [0, 1])
def test_a_search_that_has_just_begun_has_a_report(tmp_path: Path, trials: int) -> None:
    """And one in which nothing but a failure has happened."""
    found = finished(trials=6)
    some = (replace(found.trials[5], number=0, curve=()),)[:trials]
    page = written(tmp_path, Found(search=found.search, trials=some))
    assert "No trial has been evaluated yet" in page.text
    assert page.tags.count("img") == 0


def test_what_a_user_wrote_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    found = finished(trials=3)
    key = "distill.scalekd.sdf.on"
    named = replace(found.search, name=evil, recipe=f"{evil}$_{{", keys={**found.search.keys, key: {"choice": [evil]}})
    trials = tuple(
        replace(t, why=evil, state="failed" if t.number == 0 else t.state, settings={key: evil}) for t in found.trials
    )
    page = written(tmp_path, replace(found, search=named, trials=trials, conclusion=None))
    assert "script" not in page.tags
    assert page.text.count(evil) > 3


def test_a_second_report_leaves_no_figure_of_the_first(tmp_path: Path) -> None:
    written(tmp_path, finished(trials=3, latency=True))
    written(tmp_path, replace(finished(trials=3), conclusion=None))
    assert not (tmp_path / "report_front.png").exists()


def test_a_search_is_found_by_name_folder_and_file(tmp_path: Path) -> None:
    folder = tmp_path / f"{NAME}_search"
    store_of(folder).write(finished(trials=3))
    for asked in (NAME, folder.name, str(folder), str(folder / "search.json")):
        assert report.find(asked, tmp_path) == folder
    with pytest.raises(ConfigError, match=f"there: {NAME}"):
        report.find("another", tmp_path)


@pytest.mark.cluster
def test_the_report_is_kept_in_the_searchs_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("tests", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    found = finished(trials=3)
    store_of(tmp_path).write(replace(found, search=replace(found.search, parent_run=run, tracking=uri)))
    assert report.main([str(tmp_path)]) == 0
    kept = {file.path for file in client.list_artifacts(run)}
    assert kept == {"report.html", *(path.name for path in tmp_path.glob("report_*.png"))}
    store_of(tmp_path).write(replace(found, search=replace(found.search, parent_run="0" * 32, tracking=uri)))
    assert report.main([str(tmp_path)]) == 2


KEYS = {
    "a": {"loguniform": [1e-4, 1.0]},
    "b": {"uniform": [0.0, 1.0]},
    "c": {"choice": ["x", "y"]},
    "d": {"uniform": [0.0, 1.0], "when": {"c": "y"}},
}


def drawn(count: int) -> dict[int, dict[str, object]]:
    dice = random.Random(3)
    rows = {n: {"a": 10 ** dice.uniform(-4, 0), "b": dice.random(), "c": dice.choice("xy")} for n in range(count)}
    return {n: row | ({"d": dice.random()} if row["c"] == "y" else {}) for n, row in rows.items()}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_key_that_matters_is_told_from_luck(sign: int) -> None:
    settings = drawn(60)
    values = {n: sign * float(row["b"]) ** 2 for n, row in settings.items()}  # pyright: ignore[reportArgumentType]
    found = importances(KEYS, settings, values, sign)
    assert found[0].key == "b"
    assert found[0].share > 0.6
    assert found[0].told_from_luck
    assert {one.key: one.trials for one in found}["d"] == sum(row["c"] == "y" for row in settings.values())


def test_of_noise_alone_hardly_a_key_is_told_from_luck() -> None:
    dice = random.Random(0)
    told = 0
    for _ in range(4):
        found = importances(KEYS, drawn(30), {n: dice.random() for n in range(30)})
        told += sum(one.told_from_luck for one in found)
    assert told <= 5  # of 16


def test_few_trials_say_nothing_of_keys() -> None:
    assert importances(KEYS, drawn(7), dict.fromkeys(range(7), 1.0)) == []


def test_a_smoothed_mean_follows_the_curve_and_its_band_holds_it() -> None:
    dice = random.Random(1)
    at = [10 ** dice.uniform(-4, 0) for _ in range(60)]

    def hill(x: float) -> float:
        from math import log10

        return 20 - (log10(x) + 2) ** 2

    curve = response.smooth(at, [hill(x) + dice.gauss(0, 0.3) for x in at], log=True)
    assert curve is not None
    truth = [hill(x) for x in curve.at]
    assert max(abs(curve.mean - truth)) < 0.5
    assert sum(low <= t <= high for low, t, high in zip(curve.low, truth, curve.high, strict=True)) > 0.7 * len(truth)
    assert abs(curve.at[curve.mean.argmax()] / 1e-2 - 1) < 0.6


def test_the_band_of_a_key_that_does_nothing_is_that_of_the_mean() -> None:
    """A flat line through six points is no surer than their mean: its t-interval, nearly."""
    values = [10.3, 11.5, 11.2, 12.1, 10.8, 12.0]
    curve = response.smooth([16, 16, 32, 80, 96, 96], values, log=False)
    interval_of_mean = response.mean_interval(values)
    assert curve is not None
    assert interval_of_mean is not None
    assert (curve.high - curve.low).min() > 0.6 * (interval_of_mean[1] - interval_of_mean[0])


def test_no_curve_is_drawn_through_a_handful_of_points_or_one_place() -> None:
    assert response.smooth([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], log=False) is None
    assert response.smooth([1.0] * 9, list(range(9)), log=False) is None


def test_seeds_that_part_widely_widen_the_band() -> None:
    at, values = list(range(8)), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    exact, humble = (response.smooth(at, values, log=False, least_noise=n) for n in (0.0, 2.0))
    assert exact is not None
    assert humble is not None
    assert (humble.high - humble.low).mean() > 2 * (exact.high - exact.low).mean()


def test_a_choice_has_means_with_the_intervals_of_students_t() -> None:
    first, second = response.groups(["x", "y", "z"], ["y", "x", "x", "x"], [5.0, 1.0, 2.0, 4.0])
    assert (first.value, first.values, second.low) == ("x", (1.0, 2.0, 4.0), None)
    expected = interval([1.0, 2.0, 4.0])
    assert expected is not None
    assert (first.low, first.high) == pytest.approx(expected, abs=1e-3)


def trial(number: int, *values: float, state: str = "finished", **more: object) -> Trial:
    """Evaluated at steps 100, 200, ...: AP_small, each step costing 1 s."""
    curve = tuple(Point(step=100 * i, values={"AP_small": v}, seconds=100.0 * i) for i, v in enumerate(values, start=1))
    plain = {"role": "search", "settings": {}, "changes": {}, "seed": 0, "run": "r", **more}
    return Trial(number=number, state=state, curve=curve, **plain)  # pyright: ignore[reportArgumentType]


def holding(*trials: Trial) -> Found:
    return Found(search=finished(trials=3).search, trials=trials)


def test_trials_are_compared_where_nearly_all_came() -> None:
    early = [trial(n, 1.0, 2.0, state="stopped") for n in range(5)]
    level = findings.level(holding(*early, trial(5, 3.0, 4.0, 9.0), trial(6, 1.0, state="failed")))
    assert level is not None
    assert (level.step, level.values) == (200, {0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 4.0})
    assert findings.level(holding(trial(0, 1.0, state="running"))) is None


def test_noise_is_pooled_over_configurations_and_leaves_out_the_run_that_was_chosen() -> None:
    found = holding(
        trial(0, 99.0),
        trial(1, 1.0, role="plain"),
        trial(2, 3.0, role="plain", seed=1),
        trial(3, 5.0, role="again", of=0, seed=1),
        trial(4, 6.0, role="again", of=0, seed=2),
    )
    told = findings.noise(found)
    assert told is not None
    assert told.deviation == pytest.approx(((2.0 + 0.5) / 2) ** 0.5)
    assert (told.freedom, told.configurations) == (2, 2)
    assert findings.noise(holding(trial(0, 1.0), trial(1, 1.0, role="plain"))) is None


def test_a_shared_warm_up_is_paid_once() -> None:
    warm = trial(0, 1.0, role="warmup", until=100)
    forks = [replace(trial(n, 1.0, 5.0 - n), origin=0) for n in (1, 2)]
    forks = [replace(fork, curve=fork.curve[1:]) for fork in forks]
    told = findings.progress(holding(warm, *forks))
    assert [(spent.seconds, spent.best) for spent in told] == [(100.0, None), (200.0, 4.0), (300.0, 4.0)]


def test_the_front_holds_those_that_none_beats() -> None:
    def both(number: int, ap: float, ms: float) -> Trial:
        one = trial(number, ap)
        return replace(one, curve=(replace(one.curve[0], values={"AP_small": ap, "ms": ms}),))

    objectives = (Objective(name="AP_small"), Objective(name="ms", goal="min"))
    trials = [both(0, 5.0, 3.0), both(1, 6.0, 4.0), both(2, 5.0, 4.0), both(3, 4.0, 1.0), trial(4, 9.0)]
    assert [t.number for t in findings.front(objectives, trials)] == [1, 0, 3]


def test_names_lose_what_all_keys_share() -> None:
    assert findings.short_names(["distill.mkd.weight", "distill.mkd.sdf.on"]) == {
        "distill.mkd.weight": "weight",
        "distill.mkd.sdf.on": "sdf.on",
    }
    assert findings.short_names(["optim.lr", "distill.kd.weight"])["optim.lr"] == "optim.lr"
    assert findings.short_names(["distill"]) == {"distill": "distill"}
