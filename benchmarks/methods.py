"""What does each method cost beside the plain student's step, in time and in memory?

Every method in kd/methods, and the plain student, do whole training steps on the same images in one process, in turns
whose order is drawn anew each round; the teacher's taps lie in memory, so that neither loader nor cache is counted.

Time: the median over rounds of (method / plain of the same round), of this process's processors on a CPU, where other
programs share the machine; by the clock on a GPU. Memory: what autograd holds at its fullest inside a step beside
what the plain step holds, storage by storage, with no regard to how an allocator rounds (a process's resident size
tells more of the allocator's habits than of the method); on a GPU the allocator's own peak. Weights: what is learnt
beside the student, with gradient and AdamW's two moments, 16 bytes a number.

    python -m benchmarks.methods --size cpu
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.classroom import FACTOR, Classroom, built, every_method, looked
from benchmarks.plain_setup import keep_freed_memory
from data_sharding.batch import Batch, Geometry, Taps
from data_sharding.files import write_atomically
from kd.backbones import mobilenetv2, resnet
from kd.detectors import fcos
from kd.optimise import OptimConfig

ROOT = Path(__file__).parent.parent
PLAIN = "plain"
CLASSES, BOXES = 5, 12
BYTES_PER_WEIGHT = 16


@dataclass(frozen=True, kw_only=True)
class Size:
    """Who is trained on how much."""

    student: fcos.Config
    teacher: fcos.Config
    """One level coarser: it sees twice the pixels."""
    side: int
    batch: int
    device: str


SMALL = fcos.Config(backbone=mobilenetv2.Config(norm="batch", weights=None), width=32, head_depth=2, levels=(2, 3, 4))
LARGE = fcos.Config(backbone=resnet.Config(depth=50, norm="batch", weights=None), width=256, levels=(3, 4, 5, 6))
SIZES = {
    "cpu": Size(student=SMALL, teacher=replace(SMALL, width=64, levels=(3, 4, 5)), side=128, batch=8, device="cpu"),
    "gpu": Size(student=LARGE, teacher=replace(LARGE, levels=(4, 5, 6, 7)), side=640, batch=8, device="cuda"),
}


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    size = SIZES[options.size]
    path = options.results or ROOT / "benchmarks" / "results" / f"methods_{options.size}.json"
    if not options.show:
        content = measured(size, options.rounds, options.methods and options.methods.split(","))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print("\n".join(report(json.loads(path.read_text()))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", help="only these, with commas between")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/methods_<size>.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def measured(size: Size, rounds: int, only: list[str] | None = None) -> dict[str, Any]:
    """Times and bytes of every method, and why some do not go with this pair."""
    device = torch.device(size.device)
    batch = images(size).to(device)
    teacher = built(size.teacher, CLASSES, device, seed=1).eval()
    taps = looked(teacher, built(size.student, CLASSES, device), batch)
    optim = OptimConfig(optimizer="adamw", lr=1e-4, batch=size.batch, steps=10**6, warmup=0)
    wanted = {name: config for name, config in every_method().items() if only is None or name in only}
    contestants: dict[str, Classroom] = {}
    refused: dict[str, str] = {}
    for name, config in {PLAIN: None, **wanted}.items():
        try:
            contestants[name] = Classroom(
                size.student, teacher, CLASSES, None if config is None else name, config, optim, device
            )
        except ValueError as error:
            refused[name] = str(error)
    memory = {name: held(contestant, batch, taps) for name, contestant in contestants.items()}
    times: list[dict[str, float]] = []
    for number in range(rounds):
        turns = random.Random(number).sample(list(contestants), len(contestants))
        found = {name: seconds(contestants[name], batch, taps) for name in turns}
        times.append({name: round(found[name], 6) for name in contestants})
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "side": size.side,
        "batch": size.batch,
        "rounds": times,
        "bytes": memory,
        "parameters": {name: contestant.extra_parameters for name, contestant in contestants.items()},
        "refused": refused,
    }


def images(size: Size) -> Batch:
    """Noise with boxes of 4 to 40 px: what a step costs does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)

    def pixels(side: int) -> Tensor:
        return torch.randint(0, 256, (size.batch, 3, side, side), generator=generator, dtype=torch.uint8)

    def boxes() -> Tensor:
        corner = torch.rand(BOXES, 2, generator=generator) * (size.side - 41)
        return torch.cat([corner, corner + 4 + 36 * torch.rand(BOXES, 2, generator=generator)], dim=1)

    count = range(size.batch)
    return Batch(
        images=pixels(size.side),
        geometry=Geometry((size.side, size.side), torch.full((size.batch, 2), size.side)),
        boxes=tuple(boxes() for _ in count),
        labels=tuple(torch.randint(0, CLASSES, (BOXES,), generator=generator) for _ in count),
        ignore=tuple(torch.zeros(0, 4) for _ in count),
        image_ids=tuple(count),
        views=(0,) * size.batch,
        scaled_images={FACTOR: pixels(FACTOR * size.side)},
    )


def seconds(contestant: Classroom, batch: Batch, taps: Taps) -> float:
    """One step."""
    cuda = contestant.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    contestant.step(batch, taps)
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


def held(contestant: Classroom, batch: Batch, taps: Taps) -> int:
    """The most bytes of a step, after one that warms up, beyond what lies there before it."""
    contestant.step(batch, taps)
    if contestant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.step(batch, taps)
        return torch.cuda.max_memory_allocated() - before
    with saved() as meter:
        contestant.step(batch, taps)
    return meter.peak


class Meter:
    """Bytes of the storages that are held for backward, each counted once."""

    def __init__(self) -> None:
        self.peak = self._now = 0
        self._holders: Counter[int] = Counter()

    def take(self, storage: torch.UntypedStorage) -> None:
        """One more holds it."""
        self._holders[storage.data_ptr()] += 1
        if self._holders[storage.data_ptr()] == 1:
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)

    def let_go(self, storage: torch.UntypedStorage) -> None:
        """One less."""
        self._holders[storage.data_ptr()] -= 1
        if self._holders[storage.data_ptr()] == 0:
            self._now -= storage.nbytes()


class _Held:
    """A tensor that autograd keeps; when autograd drops it, so does the meter."""

    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor, self.meter, self.storage = tensor, meter, tensor.untyped_storage()
        meter.take(self.storage)

    def __del__(self) -> None:
        self.meter.let_go(self.storage)


@contextmanager
def saved() -> Iterator[Meter]:
    """Count what autograd saves inside."""
    meter = Meter()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Held(tensor.detach(), meter), lambda kept: kept.tensor
    ):
        yield meter


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The table, cheapest method first."""
    rounds, memory = content["rounds"], content["bytes"]
    plain = median(entry[PLAIN] for entry in rounds)
    yield f"{content['device']}, torch {content['torch']}, {content['batch']} images of {content['side']} px"
    yield f"plain step: {1000 * plain:.1f} ms, {memory[PLAIN] / 1e6:.1f} MB held; medians of {len(rounds)} rounds\n"
    yield f"{'method':14} {'extra time':>10} {'smallest .. largest':>22} {'extra memory':>13} {'weights':>10}"
    ratios = {name: sorted(entry[name] / entry[PLAIN] - 1 for entry in rounds) for name in memory if name != PLAIN}
    for name, found in sorted(ratios.items(), key=lambda item: median(item[1])):
        weights = BYTES_PER_WEIGHT * content["parameters"][name] / 1e6
        spread = f"{found[0]:+.0%} .. {found[-1]:+.0%}"
        more = (memory[name] - memory[PLAIN]) / 1e6
        yield f"{name:14} {median(found):>+10.0%} {spread:>22} {more:>+10.1f} MB {weights:>7.1f} MB"
    for name, reason in content["refused"].items():
        yield f"{name:14} does not go with this pair: {reason}"


if __name__ == "__main__":
    main()
