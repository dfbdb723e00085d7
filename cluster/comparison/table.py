"""The table of a comparison: means, paired differences to the plain student, what they cost, as text, CSV and plot."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.comparison.plan import PLAIN
from cluster.comparison.runs import TIME, VIEWS, seconds
from data_sharding.files import write_atomically
from kd.evaluation.paired import interval, verdict

SCORES = ("AP", "AP_small", "AP_medium")
COLOURS = {"better": "tab:green", "worse": "tab:red"}
Run = Mapping[str, Any]


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One dict per row, in the order in which the rows were first done; numbers are raw, None where there are none.

    `difference` is the mean over seeds of AP less the plain student's with the same seed, with its 95 % interval.
    """
    by_row: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_row.setdefault(run["row"], {})[run["seed"]] = run
    plain = by_row.get(PLAIN, {})
    return [_row(name, of_row, plain) for name, of_row in by_row.items()]


def _row(name: str, runs: Mapping[int, Run], plain: Mapping[int, Run]) -> dict[str, Any]:
    pairs = [(run, plain[seed]) for seed, run in runs.items() if seed in plain and name != PLAIN]
    gains = [run["metrics"]["AP"] - base["metrics"]["AP"] for run, base in pairs]
    low, high = interval(gains) or (None, None)
    held = [(run["memory_bytes"], base["memory_bytes"]) for run, base in pairs]
    known = [(mine, base) for mine, base in held if mine is not None and base is not None]
    return {
        "row": name,
        **{score: statistics.mean(run["metrics"].get(score, -1.0) for run in runs.values()) for score in SCORES},
        "difference": statistics.mean(gains) if gains else None,
        "low": low,
        "high": high,
        "seeds": len(runs),
        "extra_time": statistics.mean(seconds(r) / seconds(base) - 1 for r, base in pairs) if pairs else None,
        "extra_bytes": statistics.mean(mine - base for mine, base in known) if known else None,
        "verdict": verdict(gains) if pairs else None,
    }


def shown(table: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The rows in words, for the terminal."""
    return [
        {
            "row": row["row"],
            **{score: f"{row[score]:.2f}" if row[score] >= 0 else "-" for score in SCORES},
            "difference": _told(row["difference"], "{:+.2f}"),
            "95 % interval": "-" if row["low"] is None else f"[{row['low']:+.2f}, {row['high']:+.2f}]",
            "seeds": row["seeds"],
            "extra time": _told(row["extra_time"], "{:+.0%}"),
            "extra memory": _told(row["extra_bytes"] and row["extra_bytes"] / 1e6, "{:+.0f} MB"),
            "verdict": row["verdict"] or "-",
        }
        for row in table
    ]


def _told(value: float | None, words: str) -> str:
    return "-" if value is None else words.format(value)


def caption(content: Mapping[str, Any]) -> list[str]:
    """What a reader of the table needs to know. `content`: what the comparison's store holds."""
    facts = content["facts"]
    lines = [
        f"teacher {name}: AP {ap['own']:.2f} where it teaches, {ap['student']:.2f} at the student's resolution"
        for name, ap in facts.get("teachers_ap", {}).items()
    ]
    lines.append("difference: AP to the plain student on the same views, paired by seed, mean and 95 % interval")
    if TIME in facts:
        told = facts[TIME]
        lines.append(f"plain_equal_time: {told['steps']} steps, {told['times']:.2f}x, as long as {told['row']} takes")
    if VIEWS in facts:
        lines.append(f"plain_fresh_views: {facts[VIEWS]} views per image, none seen twice")
    return lines


def write_csv(table: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The raw numbers, one line per row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(path, text.getvalue().encode())
    return path


def write_plot(table: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path:
    """A PNG: the difference of every row to the plain student with its interval, best on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = sorted((row for row in table if row["difference"] is not None), key=lambda row: row["difference"])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(compared)), layout="constrained")
    axes = figure.add_subplot()
    for height, row in enumerate(compared):
        colour = COLOURS.get(row["verdict"], "tab:gray")
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=2)
        axes.plot(row["difference"], height, "o", color=colour)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(compared)), [row["row"] for row in compared])
    axes.set_xlabel("AP less the plain student's (paired by seed, 95 % interval)")
    axes.set_title(title)
    canvas, image = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(image)
    write_atomically(path, image.getvalue())
    return path
