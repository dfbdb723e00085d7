"""What it costs to plan an epoch of COCO's 118,287 images: the order of a run, from views and canvases to batches.

The processor's time of one thread, the best of many, because neighbours on the machine only ever add to it; beside it
a plain sort of as many 64-bit numbers, which no shuffle can undercut by much. The recipe is a real one's: several views
per image on several canvases, so that canvases change with the epoch.

    python -m benchmarks.order_plan
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from data_sharding.files import write_atomically
from data_sharding.loader import order_of
from data_sharding.order import Order
from data_sharding.views import ViewConfig, ViewTable

ROOT = Path(__file__).parent.parent
IMAGES, BATCH = 118_287, 64
BUCKETS = ((896, 1152), (1152, 896), (896, 1408), (1408, 896), (1024, 1024), (768, 1408))
ROWS = ((1, 1, 1), (1, 6, 1), (4, 6, 1), (4, 6, 16), (10, 6, 16))
"""(views per image, canvases, lanes)."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--shards", type=int, default=2621, help="of the packed data set")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "order_plan.json")
    options = parser.parse_args()
    content = [measured(*row, options.shards, options.rounds) for row in ROWS]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    print(f"{IMAGES} images in {options.shards} shards, global batch {BATCH}, best of {options.rounds}; milliseconds")
    print(f"{'views':>6} {'canvases':>9} {'lanes':>6} {'plan':>8} {'median':>8} {'first step':>11} {'sort':>7}")
    for row in content:
        print(
            f"{row['views']:6} {row['canvases']:9} {row['lanes']:6} {row['plan']:8.2f} {row['median']:8.2f} "
            f"{row['first_step']:11.2f} {row['sort']:7.2f}"
        )


def measured(views: int, canvases: int, lanes: int, shards: int, rounds: int) -> dict[str, Any]:
    """One row of the table, in milliseconds."""
    order = synthetic(views, canvases, lanes, shards)
    drawn = np.random.Generator(np.random.Philox(3)).integers(0, 2**63, IMAGES).astype(np.uint64)
    plans = [_milliseconds(lambda e=e: order.epoch(e)) for e in range(rounds)]
    fresh = [Order(order.groups, order.canvas_ids, seed=1, batch=BATCH, lanes=lanes) for _ in range(rounds)]
    first = [_milliseconds(lambda o=o: o.global_batch(0)) for o in fresh]
    sorts = [_milliseconds(lambda: drawn.copy().sort()) for _ in range(rounds)]
    return {
        "views": views, "canvases": canvases, "lanes": lanes,
        "plan": min(plans), "median": float(np.median(plans)), "first_step": min(first), "sort": min(sorts),
    }  # fmt: skip


def synthetic(views: int, canvases: int, lanes: int, shards: int) -> Order:
    """The order over a set of COCO's size: equal shards, canvases drawn for every view."""
    buckets = BUCKETS[:canvases]
    drawn = np.random.Generator(np.random.Philox(2)).integers(0, canvases, (views, IMAGES))
    rows = np.zeros((views, IMAGES, 11), np.int64)
    rows[:, :, -2:] = np.array(buckets)[drawn]
    table = ViewTable(ViewConfig(count=views, buckets=buckets), "synthetic", rows)
    dataset: Any = SimpleNamespace(groups=np.arange(IMAGES) * shards // IMAGES)
    return order_of(cast(Any, dataset), table, seed=1, batch=BATCH, lanes=lanes)


def _milliseconds(act: Callable[[], object]) -> float:
    began = time.thread_time()
    act()
    return 1000 * (time.thread_time() - began)


if __name__ == "__main__":
    main()
