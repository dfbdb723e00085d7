"""What the report of a search says: figures, tables and sentences out of its store."""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure

from cluster.tracking import RunHandle
from data_sharding.files import write_atomically
from tuning import findings, key_figures, report_figures, report_page
from tuning.drawing import legend_alone, save
from tuning.findings import Level
from tuning.importance import LEAST, TARGET, importances
from tuning.trial_store import store_of
from tuning.trials import Found, Trial, better

PAGE = "report.html"
FIGURES = "report_{}.png"
SHOWN = 10
"""Trials in the first table; the rest is folded away."""


def write(folder: Path) -> list[Path]:
    """The report of the search whose folder this is, beside its store: the page and its figures."""
    found = store_of(folder).read()
    for old in folder.glob(FIGURES.format("*")):
        old.unlink()
    return _Writer(found, folder).all()


def log(found: Found, files: list[Path]) -> None:
    """Keep copies in the search's MLflow run."""
    handle = RunHandle(found.search.parent_run, found.search.tracking)
    for path in files:
        handle.add_file(path)


class _Writer:
    """One report while it is written."""

    def __init__(self, found: Found, folder: Path) -> None:
        self._found, self._folder = found, folder
        self._objective = found.search.objectives[0]
        self._names = findings.short_names(found.search.keys)
        self._level = findings.level(found)
        self._files: list[Path] = []

    def all(self) -> list[Path]:
        """Figures first, the page last."""
        parts = [self._seeds(), self._best(), self._front(), self._importance(), self._responses()]
        parts += [self._curves(), self._cost(), self._failures()]
        title = f"Search {self._found.search.name}"
        html = report_page.page(title, self._head(), [part for part in parts if part])
        write_atomically(self._folder / PAGE, html.encode())
        return [self._folder / PAGE, *self._files]

    def _picture(self, name: str, figure: Figure) -> Path:
        path = save(figure, self._folder / FIGURES.format(name))
        self._files.append(path)
        return path

    def _head(self) -> str:
        search, found = self._found.search, self._found
        states = Counter(trial.state for trial in found.of_role("search"))
        again = len(found.of_role("again", "plain"))
        noise = findings.noise(found)
        seconds = sum(findings.own_seconds(trial, found.trials) for trial in found.trials)
        told = {
            "recipe": search.recipe,
            "space": f"{search.space}: {len(search.keys)} keys",
            "searcher": search.searcher + ("" if search.stopping == "none" else f", {search.stopping}"),
            "trials": ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet",
            "runs on further seeds": f"{again}",
            "cost": f"{_hours(seconds)} of {'processor' if search.clock == 'processor' else 'GPU'} time",
            f"{self._objective.name} between seeds": "not measured" if noise is None else
            f"±{noise.deviation:.2f} ({noise.freedom} degrees of freedom)",
            "begun": f"{datetime.fromisoformat(search.begun):%Y-%m-%d %H:%M %Z}" if search.begun else "-",
        }  # fmt: skip
        conclusion = found.conclusion
        answer = conclusion.sentence if conclusion else "No configuration has been run on further seeds yet: the best "
        answer += "" if conclusion else "trial below may owe its place to luck."
        kind = "answer better" if conclusion is not None and conclusion.beats_plain else "answer"
        return report_page.paragraph(_sentence(answer), kind) + report_page.facts(told)

    def _seeds(self) -> str:
        conclusion = self._found.conclusion
        if conclusion is None or not conclusion.contenders:
            return ""
        rows = [
            {
                "trial": one.number,
                f"mean {self._objective.name}": f"{one.mean:.2f}",
                "seeds": len(one.seeds),
                "to the plain student": f"{one.difference:+.2f}" if one.plain else "-",
                "95 % interval": "-" if one.low is None or one.high is None else f"[{one.low:+.2f}, {one.high:+.2f}]",
                "verdict": one.verdict,
                "settings": self._settings(self._found.trials[one.number]),
            }
            for one in conclusion.contenders
        ]
        picture = self._picture("seeds", report_figures.contenders(self._found))
        return report_page.section(
            "The best configurations, on several seeds",
            report_page.table(rows),
            report_page.beside(
                report_page.figure(picture, "Every dot is a run; bars are 95 % intervals of the means."),
                report_page.paragraph(
                    "Differences are paired by seed with the plain student's, more being better. The first seed is the "
                    "one by which a configuration was chosen, and flatters it a little. An arrow says that an interval "
                    "goes on beyond the axis."
                ),
            ),
        )

    def _best(self) -> str:
        searched = self._found.of_role("search")
        finished = better(self._objective, findings.finished(searched))
        others = better(self._objective, [t for t in searched if t not in finished and t.state != "failed"])
        rows = [self._row(trial) for trial in [*finished, *others]]
        if not rows:
            return report_page.section("Trials", report_page.paragraph("No trial has been evaluated yet."))
        return report_page.section(
            "Trials, one seed each",
            report_page.table(rows[:SHOWN]),
            report_page.folded(f"{len(rows) - SHOWN} more", report_page.table(rows[SHOWN:])),
        )

    def _row(self, trial: Trial) -> dict[str, object]:
        values = {one.name: trial.value(one.name) for one in self._found.search.objectives}
        return {
            "trial": trial.number,
            **{name: "-" if value is None else f"{value:.2f}" for name, value in values.items()},
            "ended": _ended(trial),
            "cost": _hours(findings.own_seconds(trial, self._found.trials)),
            "settings": self._settings(trial),
        }

    def _front(self) -> str:
        objectives = self._found.search.objectives
        if len(objectives) < 2:
            return ""
        best = findings.front(objectives[:2], self._found.of_role("search"))
        if not best:
            return ""
        picture = self._picture("front", report_figures.pareto(self._found))
        caption = f"{len(best)} finished trials to which none is better in both."
        return report_page.section(
            f"{objectives[0].name} against {objectives[1].name}",
            report_page.beside(
                report_page.figure(picture, f"{objectives[0].name} against {objectives[1].name}, one seed each."),
                report_page.paragraph(caption),
            ),
            report_page.table([self._row(trial) for trial in best[:SHOWN]]),
        )

    def _importance(self) -> str:
        heading = "Which keys matter"
        trials = len(self._level.values) if self._level else 0
        if self._level is None or trials < LEAST:
            told = f"{trials} trial(s) can be compared; below {LEAST} any answer would be luck."
            return report_page.section(heading, report_page.paragraph(told))
        settings = {number: self._found.trials[number].settings for number in self._level.values}
        rows = importances(self._found.search.keys, settings, self._level.values, self._objective.sign)
        picture = self._picture("importance", key_figures.importance(rows, self._names, trials))
        known = [self._names[one.key] for one in rows if one.told_from_luck]
        sure = f"told from luck: {', '.join(known)}" if known else "no key is told from luck"
        return report_page.section(
            heading,
            report_page.beside(
                report_page.figure(picture, "Grey bars are no more than luck gives."),
                report_page.paragraph(
                    f"How much a key decides whether a trial is among the best {TARGET:.0%} (PED-ANOVA), by {trials} "
                    f"trials {self._where(self._level)}; {sure}. Black lines are the spread over random halves of the "
                    "trials, red marks what the same trials give with their values shuffled; a number after a key says "
                    "how many trials have it, where not all do."
                ),
            ),
        )

    def _responses(self) -> str:
        if self._level is None:
            return ""
        drawn: list[Figure] = []
        pictures: list[tuple[Path, str]] = []
        for place, key in enumerate(self._found.search.keys):
            having = sum(key in self._found.trials[number].settings for number in self._level.values)
            if having:
                drawn.append(key_figures.of_key(self._found, self._level, key, self._names[key]))
                pictures.append((self._picture(f"key{place}", drawn[-1]), f"{key}, {having} trial(s)"))
        if not pictures:
            return ""
        return report_page.section(
            "What each key does",
            report_page.beside(
                report_page.paragraph(
                    f"Every dot is a trial {self._where(self._level)}; the other keys differ as well, and count as "
                    "noise. Curves are a Gaussian process through the dots with the 95 % band of the mean; they are "
                    "left out where there are too few. Dots gather where the searcher looked, so that a flat curve far "
                    "from them says little."
                ),
                report_page.figure(self._picture("keys", legend_alone(drawn)), "The same in all figures of keys."),
            ),
            report_page.figures(pictures),
        )

    def _where(self, level: Level) -> str:
        steps = self._found.search.steps
        return "at the end" if level.step >= steps else f"at step {level.step} of {steps}, which nearly all reached"

    def _curves(self) -> str:
        if not any(trial.curve for trial in self._found.trials):
            return ""
        stopped = Counter(t.last.step for t in self._found.of_role("search") if t.state == "stopped" and t.last)
        told = ", ".join(f"{count} at step {step}" for step, count in sorted(stopped.items()))
        picture = self._picture("curves", report_figures.learning_curves(self._found))
        caption = f"Stopped: {told}." if told else "No trial was stopped early."
        return report_page.section("Learning curves", report_page.figure(picture, caption), half=True)

    def _cost(self) -> str:
        if not any(spent.seconds for spent in findings.progress(self._found)):
            return ""
        picture = self._picture("cost", report_figures.cost(self._found))
        again = sum(t.seconds for t in self._found.of_role("again", "plain"))
        caption = (
            f"Training time of the trials in the order in which they were drawn. The second look on further seeds and "
            f"the plain student took another {_hours(again)}. The best of many noisy values is too high; what the "
            "chosen ones are worth stands at the right end."
        )
        return report_page.section("Cost", report_page.figure(picture, caption), half=True)

    def _failures(self) -> str:
        failed = [trial for trial in self._found.trials if trial.state == "failed"]
        rows = [{"trial": t.number, "why": t.why or "-", "settings": self._settings(t)} for t in failed]
        return report_page.section("Failed trials", report_page.table(rows)) if rows else ""

    def _settings(self, trial: Trial) -> str:
        told: Mapping[str, str] = {self._names.get(k, k): findings.as_text(v) for k, v in trial.settings.items()}
        return ", ".join(f"{name} {value}" for name, value in told.items()) or "as the recipe"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _ended(trial: Trial) -> str:
    state = "rests" if trial.state == "finished" and trial.until is not None else trial.state
    return state if trial.last is None else f"{state} at step {trial.last.step}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"
