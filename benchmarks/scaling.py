"""From one worker to two, measured; from 8 GPUs to 512, by a model whose every constant is measured or named.

Measured here: two gloo processes against one at the same images per worker, with the share of communication; how long
gloo sums buffers of several sizes; what COCO's numbers take on one processor; what looking at all ranks costs. A GPU
and a network were not at hand: their constants are assumptions, each an option with its value in the table.

    python -m benchmarks.scaling         # --show prints what is stored; --gpu-step-s 0.2 ... asks the model again
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.scaling_model import Constants, predicted, ring_s
from benchmarks.two_processes import on_ranks
from benchmarks.zero_case import measured
from cluster.build import build_student
from cluster.config import load, to_tree
from cluster.packing import pack_splits
from cluster.ranks.watching import Watch
from data_sharding.files import write_atomically
from data_sharding.record import Category, Record
from data_sharding.world import World
from kd.backbones import resnet
from kd.detectors import fcos
from kd.detectors.base import Detections
from kd.evaluation import coco
from kd.evaluation.truth import GroundTruth

ROOT = Path(__file__).parent.parent
GPUS = (1, 8, 64, 512)
SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 25)
"""Bytes of the buffers that are summed."""
EACH = 4
"""Images per worker and step of the weak scaling."""
CANVAS, TAPS = (800, 1344), ((2048, 32), (256, 8), (256, 16), (256, 32), (256, 64), (256, 128))
"""Of a COCO image for the model: C5 and P3 to P7 (channels, stride) of a ResNet with a wide pyramid."""
BYTES = {"fp16": 2.0, "int8": 1.0}
TINY = {
    "name": "fcos", "backbone": {"name": "mobilenetv2", "norm": "group"}, "width": 96, "head_depth": 2,
    "levels": [3, 4, 5, 6, 7],
}  # fmt: skip


def main() -> None:
    """The command line."""
    options = _options()
    content = json.loads(options.results.read_text()) if options.results.exists() else {"measured": {}}
    if not options.show:
        for name, measure in (("weak", _weak), ("sums", _sums), ("score", _score), ("watch", _watch)):
            if name not in content["measured"]:
                print(name, flush=True)
                content["measured"][name] = measure(options) | {"load": round(os.getloadavg()[0], 1)}
                _keep(options.results, content)
        constants = constants_of(options, content["measured"])
        rows = [asdict(p) | {"step_s": p.step_s} for p in (predicted(gpus, constants) for gpus in GPUS)]
        content |= {"constants": asdict(constants), "model": rows}
        _keep(options.results, content)
    print("\n".join(report(content)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=6, help="timed, of the weak scaling")
    add("--gpu-step-s", type=float, default=0.30, help="assumed: FCOS-R50 with ScaleKD, 2 images at 800 x 1344")
    add("--spread", type=float, default=0.03, help="assumed: of a GPU's step from one to the next, as a share")
    add("--images-per-gpu", type=int, default=2)
    add("--node-gpus", type=int, default=8)
    add("--inside-gb-s", type=float, default=100.0, help="assumed: of a GPU to its neighbour in a node")
    add("--between-gb-s", type=float, default=12.5, help="assumed: of a node to another, 100 Gbit/s")
    add("--latency-us", type=float, default=20.0, help="assumed: of a message")
    add("--codec", choices=BYTES, default="int8")
    add("--storage-gb-s", type=float, default=5.0, help="assumed: of shared storage, all readers together")
    add("--disk-gb-s", type=float, default=3.0, help="assumed: of a node's own disk")
    add("--copied", action="store_true", help="nodes read copies of the cache on their own disks")
    add("--val-images", type=int, default=5000)
    add("--look-s", type=float, default=0.05, help="assumed: a GPU's look at one image, detections and all")
    add("--storage", type=Path, default=ROOT / "runs" / "scaling", help="packed images")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.json")
    add("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _weak(options: argparse.Namespace) -> dict[str, Any]:
    """One worker and two, each with the same number of images a step."""
    found: dict[str, Any] = {"images_per_worker": EACH}
    for workers in (1, 2):
        settings = {
            "data.train": 64, "data.val": 8, "data.image_size": 128, "data.digit_size": [8, 28],
            "student": TINY, "storage": str(options.storage),
            "optim.batch": EACH * workers, "resources.workers": workers, "resources.threads": 1,
        }  # fmt: skip
        config = load("digits_student", settings)
        pack_splits(config)
        ranks = on_ranks(workers, measured, to_tree(config), str(options.storage), options.steps)
        found[str(workers)] = [{key: rank[key] for key in ("wall", "cpu", "communication")} for rank in ranks]
    found["gradient_bytes"] = 4 * sum(p.numel() for p in build_student(config, 10).parameters())
    return found


def summed(world: World, sizes: tuple[int, ...]) -> dict[str, float]:
    """Seconds of one sum over ranks, by bytes; on a rank."""
    found: dict[str, float] = {}
    for size in sizes:
        x, spent = torch.ones(size // 4), []
        for _ in range(8):
            world.barrier()
            began = time.perf_counter()
            world.sum(x)
            spent.append(time.perf_counter() - began)
        found[str(size)] = min(spent)  # other programs only ever add time
    return found


def _sums(options: argparse.Namespace) -> dict[str, Any]:
    """gloo's ring of two over loopback, and alpha and beta through its ends."""
    ranks = on_ranks(2, summed, SIZES)
    times = {size: max(rank[size] for rank in ranks) for size in ranks[0]}
    small, large = times[str(SIZES[0])], times[str(SIZES[-1])]
    return {"seconds": times, "latency_s": small / 2, "bytes_per_s": SIZES[-1] / max(large - small, 1e-9)}


def _score(options: argparse.Namespace, images: int = 100, objects: int = 7, found: int = 100) -> dict[str, Any]:
    """COCO's numbers of random boxes, as many per image as COCO has."""
    generator = torch.Generator().manual_seed(0)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=generator) * 400
        return torch.cat([corner, corner + 10 + torch.rand(count, 2, generator=generator) * 100], 1)

    truth = random_truth(images, objects, boxes, generator)
    detections = {
        i: Detections(
            boxes(found), torch.rand(found, generator=generator), torch.randint(0, 80, (found,), generator=generator)
        )
        for i in truth.image_ids
    }
    began = time.process_time()
    coco.evaluate(truth, detections)
    return {"s_per_image": (time.process_time() - began) / images, "images": images}


def random_truth(images: int, objects: int, boxes: Callable[[int], Tensor], generator: torch.Generator) -> GroundTruth:
    """Labels of 80 classes."""
    records = (
        Record(
            image=b"",
            file_name=f"{i}.jpg",
            image_id=i,
            width=640,
            height=640,
            boxes=boxes(objects).numpy(),
            labels=torch.randint(0, 80, (objects,), generator=generator).numpy(),
            annotation_ids=np.arange(objects) + i * objects + 1,
            areas=np.full(objects, 2500.0, np.float32),
            crowd=np.zeros(objects, np.bool_),
            difficult=np.zeros(objects, np.bool_),
        )
        for i in range(images)
    )
    return GroundTruth.from_records(records, [Category(id=i + 1, name=str(i)) for i in range(80)])


def watched(world: World, folder: str, times: int) -> float:
    """Seconds of one look at all ranks; on a rank."""
    watch, seconds = Watch(world, torch.device("cpu"), 1, Path(folder)), {"step": 1.0, "communication": 0.1}
    spent = []
    for step in range(times):
        world.barrier()
        began = time.perf_counter()
        watch.see(step, seconds, 16)
        spent.append(time.perf_counter() - began)
    return median(spent)


def _watch(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"s_per_look": max(on_ranks(2, watched, folder, 100))}


def constants_of(options: argparse.Namespace, found: Mapping[str, Any]) -> Constants:
    """What the command line assumes and what was measured or counted."""
    student = fcos.build(fcos.Config(backbone=resnet.Config(depth=50, norm="group")), 80)
    cells = sum(channels * -(-CANVAS[0] // s) * -(-CANVAS[1] // s) for channels, s in TAPS)
    return Constants(
        step_s=options.gpu_step_s,
        spread=options.spread,
        images_per_gpu=options.images_per_gpu,
        gradient_bytes=4.0 * sum(p.numel() for p in student.parameters()),
        node_gpus=options.node_gpus,
        inside_bytes_per_s=1e9 * options.inside_gb_s,
        between_bytes_per_s=1e9 * options.between_gb_s,
        latency_s=1e-6 * options.latency_us,
        cache_bytes_per_image=BYTES[options.codec] * cells,
        storage_bytes_per_s=1e9 * options.storage_gb_s,
        disk_bytes_per_s=1e9 * options.disk_gb_s,
        copied=options.copied,
        val_images=options.val_images,
        look_s_per_image=options.look_s,
        score_s_per_image=found["score"]["s_per_image"],
    )


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The tables of what is stored."""
    yield from _measured(content["measured"])
    c = content["constants"]
    told = ", ".join(f"{name} {value:.4g}" for name, value in c.items())
    yield f"\nthe model, FCOS-R50 with ScaleKD, {c['images_per_gpu']} images per GPU; constants: {told}"
    heads = ("own s", "slowest s", "sum s", "cache s", "cache GB/s", "step s", "images/s", "efficiency", "evaluation s")
    yield f"{'GPUs':>6}" + "".join(f"{head:>14}" for head in heads)
    keys = (
        "own_s", "slowest_s", "all_reduce_s", "cache_wait_s", "cache_gb_per_s", "step_s", "images_per_s", "efficiency",
        "evaluation_s",
    )  # fmt: skip
    for row in content["model"]:
        yield f"{row['gpus']:6}" + "".join(f"{row[key]:14.4g}" for key in keys)


def _measured(found: Mapping[str, Any]) -> Iterator[str]:
    weak, sums = found["weak"], found["sums"]
    yield f"\nmeasured, {weak['images_per_worker']} images per worker and step, load {weak['load']}"
    yield f"{'workers':>8}{'wall s':>10}{'processor s':>13}{'in collectives s':>18}{'share':>8}"
    for workers in ("1", "2"):
        wall, cpu, wait = (median(rank[key] for rank in weak[workers]) for key in ("wall", "cpu", "communication"))
        yield f"{workers:>8}{wall:10.3f}{cpu:13.3f}{wait:18.3f}{wait / wall:8.1%}"
    efficiency = weak["1"][0]["wall"] / max(rank["wall"] for rank in weak["2"])
    ring = ring_s(2, weak["gradient_bytes"], sums["bytes_per_s"], sums["latency_s"])
    yield f"weak scaling 1 -> 2: {efficiency:.1%} by wall time"
    speed = sums["bytes_per_s"] / 1e9
    yield f"gloo: {1e6 * sums['latency_s']:.0f} us a message, {speed:.2f} GB/s (load {sums['load']})"
    yield f"the model says {ring:.4f} s for the gradient of {weak['gradient_bytes'] / 1e6:.1f} MB, waiting not counted"
    yield f"COCO's numbers: {1000 * found['score']['s_per_image']:.2f} ms of a processor per image"
    yield f"a look at all ranks: {1000 * found['watch']['s_per_look']:.2f} ms, by default once in 20 steps"


if __name__ == "__main__":
    main()
