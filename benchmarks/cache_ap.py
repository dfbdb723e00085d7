"""Does what a codec rounds away, or leaves out, cost AP? HIT-UAV on a processor, the recipe of `benchmarks.hit_uav`.

    python -m benchmarks.cache_ap

ScaleKD reads every position of its teacher's taps: `live` against dense int8. FGFI reads positions on objects alone:
`live` against dense int8 and foreground-sparse int8. In rounds by seed, row by row, continued by the same command.
`live` is the teacher's own float32 taps out of a cache that keeps them whole, which are a live teacher's to the bit
(asked first, on the first steps of each method, and always by `tests/end_to_end/test_cached_equals_live.py`).
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import hit_uav
from benchmarks.hit_uav_presets import Preset, presets
from benchmarks.paired import table
from benchmarks.plain_run import train
from benchmarks.plain_setup import Setup, Teaching, keep_freed_memory
from benchmarks.plain_teaching import fill_cache
from benchmarks.store import Store, fingerprint
from kd.methods import fgfi
from kd.methods.base import MethodConfig

ROOT = Path(__file__).parent.parent
LIVE = "fp32"
CODECS: Mapping[str, tuple[str, ...]] = {"scalekd": (LIVE, "int8"), "fgfi": (LIVE, "int8", "sparse")}
"""Who is trained from which cache."""
FGFI_WEIGHT = 0.002
"""Its own 0.01 is more than the whole task loss here; this is a tenth of it (found on another seed in 300 steps)."""
CHECKED_STEPS = 3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT / ".." / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared / "hit_uav", help="the folder of HIT-UAV")
    parser.add_argument("--weights", type=Path, default=shared / "weights" / "mobilenet_v2-b0353104.pth")
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "hit_uav_cpu", help="with hit_uav's teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--show", action="store_true", help="print the stored rows and train nothing")
    parser.add_argument("--minutes", type=float, help="begin no row after this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    preset, names = (with_fgfi(presets(str(w))["cpu"]) for w in (options.weights, "weights"))
    store = Store(ROOT / "benchmarks" / "results" / "cache_ap.json", fingerprint((names, CODECS)))
    if not options.show:
        options.size = "cpu"
        run(hit_uav.setup_of(preset, options), preset, store, options)
    show(store)


def with_fgfi(preset: Preset) -> Preset:
    """The preset's methods that are compared here."""
    methods: dict[str, Mapping[str, MethodConfig]] = {"scalekd": preset.methods["scalekd"]}
    return replace(preset, methods=methods | {"fgfi": {"fgfi": fgfi.Config(weight=FGFI_WEIGHT, start=0.0)}})


def run(setup: Setup, preset: Preset, store: Store, options: argparse.Namespace) -> None:
    """Train every row that is missing."""
    began = time.monotonic()
    hit_uav.ensure_teacher(setup, preset, store)
    for method in CODECS:
        require_live_is_cached(taught(setup, preset, method, LIVE))
    for method, codec, seed in rounds(options.seeds):
        name = row_name(method, codec)
        if store.row(name, seed) is not None:
            continue
        if options.minutes is not None and (time.monotonic() - began) / 60 > options.minutes:
            print(f"stopped before {name}, seed {seed}; the same command goes on with it")
            return
        settings = replace(taught(setup, preset, method, codec), seed=seed)
        fill_cache(settings)
        row = hit_uav.row_of(train(settings), name, seed)
        store.add(row)
        print(hit_uav.as_line(row), flush=True)


def rounds(seeds: int) -> Iterator[tuple[str, str, int]]:
    """(method, codec, seed), seed by seed."""
    return ((method, codec, seed) for seed in range(seeds) for method, codecs in CODECS.items() for codec in codecs)


def row_name(method: str, codec: str) -> str:
    """The name of a row."""
    return f"{method} {'live' if codec == LIVE else codec}"


def taught(setup: Setup, preset: Preset, method: str, codec: str) -> Setup:
    """A student of `method` with a cached teacher."""
    teaching = Teaching(folder=hit_uav.teacher_folder(setup), factor=2, align="shift", codec=codec)
    return replace(setup, methods=preset.methods[method], teaching=teaching)


def require_live_is_cached(setup: Setup) -> None:
    """Raise unless the first steps have the same losses, to the bit, with a live teacher and with the cache."""
    assert setup.teaching is not None
    short = replace(setup, optim=replace(setup.optim, steps=CHECKED_STEPS, warmup=0))
    cached, live = (
        train(replace(short, teaching=replace(setup.teaching, cached=c)), evaluated=False).history
        for c in (True, False)
    )
    losses = [[{k: v for k, v in step.items() if k.startswith("loss/")} for step in run] for run in (cached, live)]
    if losses[0] != losses[1]:
        raise RuntimeError(f"the cached taps are not the live teacher's: losses {losses[0]} and {losses[1]}")


def show(store: Store) -> None:
    """Each method's rows, with the differences to its live teacher."""
    rows = store.read()["rows"]
    for method in CODECS:
        scores: dict[str, dict[int, dict[str, float]]] = {}
        for row in rows:
            if row["method"].startswith(f"{method} "):
                scores.setdefault(row["method"], {})[row["seed"]] = row
        if scores:
            print(f"\n{method}")
            print(table(scores, row_name(method, LIVE), hit_uav.COLUMNS))


if __name__ == "__main__":
    main()
