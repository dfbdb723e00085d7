"""What sharding, offloading and recomputing save of a detector's memory, and what they cost.

Two gloo processes train through the cluster's own worker: an FCOS-R50 taught live by an FCOS-R101, a small student with
a large live teacher, and the demo's student for its AP. Weights are random but for the last, which memory and time do
not see. Rows are stored one by one; the same command goes on behind them.

    python -m benchmarks.zero            # some minutes a row on a processor; --show prints what is stored
"""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.two_processes import on_ranks
from benchmarks.zero_case import learnt, measured
from cluster.build import build_student
from cluster.config import RunConfig, load, to_tree
from cluster.packing import pack_splits
from data_sharding.datasets import digits
from data_sharding.files import write_atomically
from kd import student as student_files
from kd.backbones import resnet
from kd.detectors import fcos

ROOT = Path(__file__).parent.parent
RANKS = 2
FLOAT = 4
MOMENTA = 2
"""Numbers that AdamW remembers per weight."""
DATA = {"data.train": 32, "data.val": 12, "data.image_size": 128, "data.digit_size": [8, 28]}
LEVELS = [3, 4, 5, 6, 7]
R50 = {
    "name": "fcos", "backbone": {"name": "resnet", "depth": 50, "norm": "group"}, "width": 256, "head_depth": 4,
    "levels": LEVELS,
}  # fmt: skip
TINY = {
    "name": "fcos", "backbone": {"name": "mobilenetv2", "norm": "group"}, "width": 64, "head_depth": 1,
    "levels": LEVELS,
}  # fmt: skip
R101 = fcos.Config(backbone=resnet.Config(depth=101, norm="group"))
LARGE = fcos.Config(backbone=resnet.Config(depth=101, norm="group"), width=768, head_depth=1)
OFFLOAD, RECOMPUTE = {"resources.offload": True}, {"resources.activation_checkpointing": True}


def zero(stage: int) -> dict[str, Any]:
    """The setting."""
    return {"resources.zero": stage}


MEMORY: Mapping[str, Mapping[str, Any]] = {
    **{f"R50 + R101, ZeRO {stage}": zero(stage) for stage in range(4)},
    "R50 + R101, recomputed": RECOMPUTE,
    **{f"R50 + R101, ZeRO {stage}, offload": zero(stage) | OFFLOAD for stage in (2, 3)},
    "R50 + R101, ZeRO 3, offload, recomputed": zero(3) | OFFLOAD | RECOMPUTE,
    "tiny + large": {"student": TINY},
}
LEARNING: Mapping[str, Mapping[str, Any]] = {
    **{f"AP, ZeRO {stage}": zero(stage) for stage in range(4)},
    "AP, ZeRO 2, offload, recomputed": zero(2) | OFFLOAD | RECOMPUTE,
}


def main() -> None:
    """The command line."""
    options = _options()
    if not options.show:
        for name in [*MEMORY, *LEARNING]:
            content = _read(options.results)
            if options.only in name and name not in content["rows"]:
                print(name, flush=True)
                row = _learning(name, options) if name in LEARNING else _memory(name, options)
                content["rows"][name] = row | {"load": round(os.getloadavg()[0], 1)}
                options.results.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(options.results, (json.dumps(content, indent=1) + "\n").encode())
    print("\n".join(report(_read(options.results))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed per row")
    parser.add_argument("--ap-steps", type=int, default=40, help="of the small recipe's schedule")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "zero", help="packed images, random teachers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "zero.json")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def _read(path: Path) -> dict[str, Any]:
    settings = {"ranks": RANKS, "data": DATA, "torch": str(torch.__version__)}
    found = json.loads(path.read_text()) if path.exists() else {"settings": settings, "rows": {}}
    if found["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(f"{path} holds results of other settings ({found['settings']}); rename it to begin anew")
    return found


def _memory(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: what every rank measured, and what the arithmetic says."""
    config = _taught(name, options)
    found = on_ranks(RANKS, measured, to_tree(config), str(options.storage), options.steps)
    return {"ranks": found, "theory": theory(config)}


def _taught(name: str, options: argparse.Namespace) -> RunConfig:
    """One image per rank at 128 x 128, taught live."""
    teacher = LARGE if "large" in name else R101
    folder = options.storage / ("large" if teacher is LARGE else "r101")
    if not (folder / student_files.FACTS).exists():
        torch.manual_seed(0)
        categories = digits.categories(digits.Config())
        student_files.save(fcos.build(teacher, len(categories)), teacher, categories, folder)
    config = load(
        "digits_student",
        DATA
        | {
            "storage": str(options.storage), "student": R50, "distill": {"pkd": {}}, "optim.batch": RANKS,
            "teachers": [{"weights": str(folder), "cache": False, "factor": 1, "gate_images": 1}],
            "resources.workers": RANKS, "resources.threads": 1,
        }
        | dict(MEMORY[name]),
    )  # fmt: skip
    pack_splits(config)
    return config


def _learning(name: str, options: argparse.Namespace) -> dict[str, Any]:
    settings = {
        "storage": str(options.storage), "optim.steps": options.ap_steps, "optim.warmup": options.ap_steps // 5,
        "resources.workers": RANKS, "resources.threads": 1,
    }  # fmt: skip
    config = load("digits_student", DATA | {"data.train": 64} | settings | dict(LEARNING[name]))
    pack_splits(config)
    return on_ranks(RANKS, learnt, to_tree(config), str(options.storage))[0] | {"steps": options.ap_steps}


def theory(config: RunConfig) -> dict[str, float]:
    """Bytes of one rank's states by Rajbhandari et al., SC 2020 (arXiv:1910.02054), section 5, in float32: what a stage
    shares out it divides by the ranks; from stage 1 on the optimizer steps on a copy of the weights."""
    stage = config.resources.zero
    count = sum(p.numel() for p in build_student(config, len(digits.categories(digits.Config()))).parameters())

    def of(numbers: float, least: int) -> float:
        return FLOAT * count * numbers / (RANKS if stage >= least else 1)

    return {"weights": of(1, 3), "gradients": of(1, 2), "optimizer": of(MOMENTA + (stage > 0), 1)}


COLUMNS = ("peak", "weights", "gradients", "optimizer", "teacher", "activations")


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The tables of what is stored; of two ranks the larger. MB are 10^6 bytes."""
    rows = content["rows"]
    yield f"\n{content['settings']}\n\n{'MB per rank (theory)':42}" + "".join(f"{name:>17}" for name in COLUMNS)
    for name in (name for name in MEMORY if name in rows):
        found = {column: max(rank[column] for rank in rows[name]["ranks"]) / 1e6 for column in COLUMNS}
        told = rows[name]["theory"]
        cells = (f"{found[c]:.0f}" + (f" ({told[c] / 1e6:.0f})" if c in told else "") for c in COLUMNS)
        yield f"{name:42}" + "".join(f"{cell:>17}" for cell in cells)
    yield f"\n{'seconds per step':42}{'wall':>12}{'processor':>12}{'in collectives':>16}{'load':>8}"
    for name in (name for name in MEMORY if name in rows):
        ranks, load_ = rows[name]["ranks"], rows[name]["load"]
        wall, cpu, wait = (max(rank[key] for rank in ranks) for key in ("wall", "cpu", "communication"))
        yield f"{name:42}{wall:12.2f}{cpu:12.2f}{wait:16.2f}{load_:8.1f}"
    yield f"\n{'the small recipe':42}{'steps':>8}{'AP':>10}{'AP50':>10}{'last loss':>14}{'largest gap':>14}"
    first = next((rows[name]["losses"] for name in LEARNING if name in rows), [])
    for name in (name for name in LEARNING if name in rows):
        row = rows[name]
        gap = max(abs(a - b) / abs(b) for a, b in zip(row["losses"], first, strict=False))
        yield f"{name:42}{row['steps']:8}{row['AP']:10.3f}{row['AP50']:10.3f}{row['losses'][-1]:14.6f}{gap:14.1e}"


if __name__ == "__main__":
    main()
