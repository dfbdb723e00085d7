"""The doctor on sizes: what the student sees of the objects, after the recipe's views, on its own grid."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cluster.checkup.data import Labels, Seen
from cluster.checkup.findings import Area, Finding, share
from cluster.config import RunConfig, evaluation_views
from data_sharding.view_policy import CANVAS_STEP, View, ViewConfig
from data_sharding.views import draw, place_boxes

EDGES = (0, 4, 8, 16, 32, 96)
"""Pixels of a box's edge, sqrt(w h); the last class is open."""
SMALL = 32.0**2
"""COCO's small: px^2 of the image as it is stored, which is where AP_small is measured."""
MANY_BELOW_STRIDE = 0.1
MUCH_PADDING = 0.35
SHRUNK = 0.98
"""A view that keeps less than this of its size was shrunk to fit a canvas."""
CAPS = (100, 300, 500, 1000, 1500, 2000, 3000)
BAR = 30


@dataclass(frozen=True)
class Placed:
    """An image under one view."""

    view: View
    edges: np.ndarray
    """(N,) sqrt(w h) of the boxes on the canvas, px."""


def examine(config: RunConfig, labels: Labels, strides: tuple[int, ...]) -> Area:
    """Box sizes on the student's canvas, its grid, canvases and the caps on detections."""
    placed = [p for seen in labels.seen["train"] for p in _placed(config.views, seen)]
    edges = np.concatenate([p.edges for p in placed])
    findings = [_small(labels), _below_stride(config, edges, strides[0]), _crowded(config, labels)]
    findings += _canvases(config, labels, placed)
    if any(t.factor > 1 for t in config.teachers):
        findings.append(_teachers_pixels(config, labels))
    return Area(title="sizes", findings=findings, tables=[("box edge in the student's pixels", _histogram(edges))])


def _placed(config: ViewConfig, seen: Seen) -> Iterator[Placed]:
    """The image in its first views (at most two: flips do not change sizes, scales and crops do)."""
    for index in range(min(2, config.count)):
        view = draw(config, "doctor", seen.image_id, seen.width, seen.height, seen.boxes, index)
        boxes, visible = place_boxes(seen.boxes, view)
        shown = boxes[visible >= config.min_visible]
        yield Placed(view, (shown[:, 2:] - shown[:, :2]).clamp(min=0).prod(1).sqrt().numpy())


def _histogram(edges: np.ndarray) -> list[dict[str, object]]:
    counts = np.histogram(edges, [*EDGES, np.inf])[0]
    names = [f"{a} to {b} px" for a, b in pairwise(EDGES)] + [f"above {EDGES[-1]} px"]
    most = max(1, int(counts.max()))
    return [
        {"edge": name, "boxes": n, "share": share(n, len(edges)), "": ("#" * round(BAR * n / most)).ljust(BAR, ".")}
        for name, n in zip(names, counts.tolist(), strict=True)
    ]


def _small(labels: Labels) -> Finding:
    areas = np.concatenate([s.areas for s in labels.seen["val"]])
    told = f"{share(int((areas < SMALL).sum()), len(areas))} of val's objects are small for COCO (below 32 x 32 px)"
    return Finding(check="small objects", found=told)


def _below_stride(config: RunConfig, edges: np.ndarray, stride: int) -> Finding:
    below = int((edges < stride).sum())
    told = f"{share(below, len(edges))} of the boxes are smaller than a cell of the finest level (stride {stride})"
    if below <= MANY_BELOW_STRIDE * len(edges):
        return Finding(check="finest level", found=told)
    levels = getattr(config.student, "levels", ())
    if levels and levels[0] > 2:
        fix = f"student.levels={list(range(levels[0] - 1, levels[-1] + 1))} (and the same for the teacher)"
    elif config.views.short_side is not None:
        double = [2 * side for side in config.views.short_side]
        buckets = [[2 * h, 2 * w] for h, w in config.views.buckets]
        long = 2 * config.views.long_side
        fix = f"views.short_side={double} views.long_side={long} views.buckets={buckets}".replace(" [", "[")
    else:
        fix = "larger images, or views.crop"
    return Finding(check="finest level", found=told, verdict="warn", change=f"{told}: {fix}")


def _crowded(config: RunConfig, labels: Labels) -> Finding:
    """Detections beyond a cap are lost, whatever the student learns."""
    most = max(len(s.labels) for split in labels.seen.values() for s in split)
    caps = {"evaluation.max_dets": config.evaluation.max_dets[-1]}
    own: Any = getattr(config.student, "detections", None)
    caps |= {} if own is None else {"student.detections": own}
    told = f"at most {most} objects in an image; caps: {', '.join(f'{k} {v}' for k, v in caps.items())}"
    if most <= min(caps.values()):
        return Finding(check="crowds", found=told)
    enough = next((cap for cap in CAPS if cap >= most), most)
    dets = [*(n for n in config.evaluation.max_dets[:-1] if n < enough), enough]
    fixes = {"evaluation.max_dets": dets, "student.detections": enough}
    fix = " ".join(f"{key}={fixes[key]}".replace(" ", "") for key, cap in caps.items() if cap < most)
    images = sum(len(s.labels) > min(caps.values()) for split in labels.seen.values() for s in split)
    change = f"{images} image(s) hold more objects than may be found: {fix}"
    return Finding(check="crowds", found=told, verdict="warn", change=change)


def _canvases(config: RunConfig, labels: Labels, placed: list[Placed]) -> list[Finding]:
    used = sum(p.view.size[0] * p.view.size[1] for p in placed)
    padding = 1 - used / sum(p.view.canvas[0] * p.view.canvas[1] for p in placed)
    buckets = ", ".join(f"{h} x {w}" for h, w in config.views.buckets)
    told = f"{buckets}: {share(padding, 1)} of them is padding"
    fit = Finding(check="canvases", found=told)
    if padding > MUCH_PADDING:
        change = f"{told}, computed for nothing: views.buckets={_fitting(placed)}"
        fit = Finding(check="canvases", found=told, verdict="warn", change=change)
    views, plain = evaluation_views(config), config.views.scale == (1.0, 1.0) and config.views.crop is None
    shrunk = [s for split in ("train", "val") for s in labels.seen[split] if plain and _kept(views, s) < SHRUNK]
    if not shrunk:
        return [fit]
    least = min(_kept(views, s) for s in shrunk)
    told = f"{len(shrunk)} image(s) fit in no canvas and are shrunk, to {share(least, 1)} of their size at worst"
    return [fit, Finding(check="shrunk images", found=told, verdict="warn", change=f"{told}: add to views.buckets")]


def _fitting(placed: list[Placed]) -> str:
    """Canvases that hold the views, on the grid that canvases have."""
    found = {tuple(-(-side // CANVAS_STEP) * CANVAS_STEP for side in p.view.size) for p in placed}
    widest = sorted(found, key=lambda b: b[0] * b[1], reverse=True)[:4]
    return str([list(b) for b in widest]).replace(" ", "")


def _asked(config: ViewConfig, seen: Seen) -> float:
    """The resize that `config` asks for, before any canvas."""
    if config.short_side is None:
        return 1.0
    shorter, longer = sorted((seen.width, seen.height))
    return min(config.short_side[0] / shorter, config.long_side / longer)


def _kept(config: ViewConfig, seen: Seen) -> float:
    view = draw(config, "doctor", seen.image_id, seen.width, seen.height, seen.boxes, 0)
    return max(view.size[0] / seen.height, view.size[1] / seen.width) / _asked(config, seen)


def _teachers_pixels(config: RunConfig, labels: Labels) -> Finding:
    """A teacher at twice the pixels sees more only where the files hold more."""
    views = evaluation_views(config)
    enlarged = sum(2 * _asked(views, s) > 1.05 for s in labels.seen["train"])
    told = f"at 2x the teacher sees {share(enlarged, len(labels.seen['train']))} of the images larger than their files"
    return Finding(check="teacher's pixels", found=told, verdict="note" if enlarged else "ok")
