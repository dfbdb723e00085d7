"""How much of a teacher's time filling a cache takes: the bare forward against rendering, looking, encoding, writing.

Each round looks at the same batches three times in one process: bare (the teacher over batches that lie assembled in
memory), filling (what every actor of `cluster.cache_teacher` does: shards on disk, synced, with receipts) and one step
after the other (the same without threads). Same teacher, batch and torch threads; rounds take turns, and a filling is
compared with the bare passes on either side of it.

    python -m benchmarks.precompute
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.plain_setup import keep_freed_memory
from cluster import build
from cluster import config as recipes
from cluster.build import Split
from cluster.packing import pack_splits
from cluster.precompute.ahead import AheadOfWriting, give_way
from cluster.precompute.batches import Assembled
from cluster.precompute.keys import cache_key
from data_sharding.batch import Batch
from data_sharding.cache.key import CacheKey
from data_sharding.cache.plan import plan
from data_sharding.cache.writer import CacheWriter, Seen
from data_sharding.files import write_atomically
from kd import student as student_files
from kd.backbones import mobilenetv2
from kd.detectors import fcos
from kd.teacher import LiveTeacher

ROOT = Path(__file__).parent.parent
TEACHER = fcos.Config(backbone=mobilenetv2.Config(), width=256, head_depth=1, levels=(3, 4, 5))


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    split, key, live = prepare(options)
    folder, batches = options.storage / "filling", assembled(split, key)
    with Assembled(split, 2, initializer=give_way) as pixels:
        ahead = AheadOfWriting(pixels, live, torch.device("cpu"))
        acts: dict[str, Callable[[], object]] = {
            "bare": lambda: [live(batch) for batch in batches],
            "filling": lambda: fill(folder, key, split, lambda writer: ahead.fill(writer, writer.shards)),
            "one by one": lambda: fill(folder, key, split, lambda writer: one_by_one(writer, pixels, live)),
        }
        acts["filling"]()  # the first pass of a process finds no memory and no kernel
        rounds = [one_round(acts) for _ in range(options.rounds)]
        ahead.close()
    written = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
    shutil.rmtree(folder)
    content = {
        "threads": options.threads, "cores": os.cpu_count(), "codec": options.codec, "side": options.side,
        "batch": key.batch, "batches": len(batches), "bytes_per_batch": written / len(batches), "rounds": rounds,
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    report(content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--side", type=int, default=256, help="of the student's canvas; the teacher sees twice as much")
    parser.add_argument("--codec", default="fp16")
    parser.add_argument("--threads", type=int, default=1, help="of the teacher")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "precompute", help="on the disk to be measured")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "precompute.json")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Split, CacheKey, LiveTeacher]:
    """Pack the images; a teacher with random weights, on whose values its time does not depend."""
    weights, side = options.storage / "teacher", options.side
    config = recipes.load(
        "digits_scalekd",
        {
            "name": "precompute", "storage": str(options.storage), "data.image_size": 640, "data.train": options.images,
            "data.val": 1, "teachers.0.weights": str(weights), "teachers.0.codec": options.codec,
            "views.short_side": [side], "views.buckets": [[side, side]], "optim.steps": 1000,
        },
    )  # fmt: skip
    pack_splits(config)
    train = build.open_train(config)
    categories = train.dataset.categories
    if not (weights / student_files.FACTS).exists():
        torch.manual_seed(0)
        student_files.save(fcos.build(TEACHER, len(categories)), TEACHER, categories, weights)
    student = build.build_student(config, len(categories)).shapes
    teacher = build.load_teacher(config.teachers[0], categories)
    key = cache_key(config, teacher, student, train)
    return train, key, build.live_teacher(teacher, student, build.stored_of(config, config.teachers[0]))


def assembled(split: Split, key: CacheKey) -> list[Batch]:
    """The batches of the cache's plan, in memory."""
    with Assembled(split, 2) as pixels:
        shards = plan(key, split.dataset, split.views)
        return [pixels.batch(np.array(b), s.view) for s in shards for b in s.batches]


def fill(folder: Path, key: CacheKey, split: Split, act: Callable[[CacheWriter], object]) -> None:
    """Write a cache anew."""
    shutil.rmtree(folder, ignore_errors=True)
    act(CacheWriter(folder, key, split.dataset, split.views))


def one_by_one(writer: CacheWriter, pixels: Assembled, live: LiveTeacher) -> None:
    """Render, look, encode and write, never two at a time."""

    def seen(positions: np.ndarray, view: int) -> Seen:
        batch = pixels.batch(positions, view)
        return Seen(live(batch), batch.images)

    for shard in writer.shards:
        writer.fill(shard, seen)


def one_round(acts: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """Seconds of every pass, on the wall and of the processor; `bare` is what came before and behind."""
    found: dict[str, Any] = {"load": round(os.getloadavg()[0], 2), "bare": []}
    for name in ("bare", "filling", "bare", "one by one"):
        began = time.perf_counter(), time.process_time()
        acts[name]()
        seconds = [round(time.perf_counter() - began[0], 4), round(time.process_time() - began[1], 4)]
        found[name] = [*found["bare"], seconds] if name == "bare" else seconds
    return found


def report(content: Mapping[str, Any]) -> None:
    """The table of what was measured: shares of the bare forward's speed that are left."""
    rounds, batches = content["rounds"], content["batches"]
    bare = [sum(wall for wall, _ in r["bare"]) / len(r["bare"]) for r in rounds]
    print(
        f"{content['cores']} cores, {content['threads']} thread(s) for the teacher, {content['batch']} images a batch, "
        f"{content['codec']}: {content['bytes_per_batch'] / 1e6:.1f} MB a batch; {len(rounds)} rounds"
    )
    print(f"{'':14} {'ms a batch':>11} {'processor':>10} {'of the bare speed':>18} {'worst .. best':>16}")
    cpu = median(c for r in rounds for _, c in r["bare"])
    print(f"{'bare forward':14} {1000 * median(bare) / batches:11.0f} {1000 * cpu / batches:10.0f} {1:18.3f}")
    for name in ("filling", "one by one"):
        ratios = sorted(b / r[name][0] for b, r in zip(bare, rounds, strict=True))
        wall, cpu = (median(r[name][i] for r in rounds) for i in (0, 1))
        told = f"{ratios[0]:.3f} .. {ratios[-1]:.3f}"
        print(f"{name:14} {1000 * wall / batches:11.0f} {1000 * cpu / batches:10.0f} {median(ratios):18.3f} {told:>16}")


if __name__ == "__main__":
    main()
