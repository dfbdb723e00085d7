"""How fast a teacher cache is read: our reader with every codec, and what others offer, against a copy of memory.

The limit is one thread that copies the same number of dense fp16 samples from memory to memory. Everyone's passes are
interleaved, round after round, each between two passes of that copy, and compared with these two alone. Every sample
is read in random order into a batch buffer, of which three are in use at a time; then, outside the time, all its bytes
are summed and compared with what was stored. Two working sets, above and below the last-level cache: a guest is told of
its host's whole cache, however small its own part, which `--cache` then says. `staged` are
stored rows in the batch buffer (they are decoded on the training device), `ready` fp16 maps on the CPU; only int8 and
sparse codecs differ in the two. Columns:

    cold      files dropped from memory before: from the disk, opened anew (in the first round only)
    first     files in memory, opened anew
    mapped    the second pass and later: the goals are 0.85 (fp16), 1.9 (int8), 18 (sparse, 10 % foreground)
    verified  mapped, and every sample's checksum compared on every read
    p50, p99  of one sample at a time, mapped; the goal is p99 <= 3 p50

All but p50 and p99 are samples per second as a multiple of the copy's: medians over rounds. `by CPU` is the same of
processor time, and of the reading thread's for p99/p50: what other programs on the machine do not add to. Rounds are
stored one contestant at a time; the same command goes on where it was stopped. Peers that are not installed are named;
they go into an environment of their own (benchmarks/peers.txt says how):

    /somewhere/peers/bin/python -m benchmarks.cache_read --rounds 9
"""

import argparse
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cache_read_data import Case, Stored, cases, dense_bytes, make
from benchmarks.cache_read_pass import RING, Contestant, Copy, Library, Ours, Rows, forget, names, run
from benchmarks.cache_read_peers import PEERS
from benchmarks.store import Store, fingerprint
from data_sharding.cache.key import CACHE_FORMAT

ROOT = Path(__file__).parent.parent
CANVAS = {"above": (768, 1408), "below": (256, 256)}
BATCH = {"above": 8, "below": 4}
LEAST = 64
"""Samples of the large working set."""
ONE_BY_ONE = 256
"""Reads that p50 and p99 are taken from, in each round."""


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(1)
    cache = options.cache * 2**20 if options.cache else last_level_cache()
    for size in options.sizes:
        settings = (CANVAS[size], BATCH[size], LEAST, ONE_BY_ONE, RING, cache, CACHE_FORMAT, str(torch.__version__))
        store = Store(options.results / f"cache_read_{size}.json", fingerprint(settings))
        if not options.show:
            measure(size, cache, options, store)
        print_table(f"{size} the last-level cache of {cache / 2**20:.0f} MiB", store.read()["rows"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=CANVAS, default=list(CANVAS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="contestants whose name holds this")
    parser.add_argument(
        "--cache", type=int, default=0, help="MiB of the last-level cache that are really this machine's"
    )
    parser.add_argument("--storage", type=Path, default=ROOT / "runs" / "cache_read", help="some 10 GB on a local disk")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--show", action="store_true", help="only print what is stored")
    return parser.parse_args()


def last_level_cache() -> int:
    """Bytes of the largest processor cache; 32 MiB where the system does not say."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(s.rstrip("KMG")) * 1024 ** ("_KMG".find(s[-1])) for s in sizes), default=32 * 2**20)


def samples(size: str, case: Case, cache: int) -> int:
    """How many make a working set that is four times the last-level cache, as this codec stores it, or a quarter."""
    full = dense_bytes(CANVAS[size])
    if size == "below":
        return max(2 * BATCH[size], cache // 4 // full)
    stored = {0: 1.0, 3: 0.02, 10: 0.06, 30: 0.165}[case.foreground] * full * (0.5 if "int8" in case.codec else 1.0)
    return max(LEAST, int(4 * cache / stored))


def measure(size: str, cache: int, options: argparse.Namespace, store: Store) -> None:
    """Prepare the working sets, then all rounds that are not stored yet."""
    folder = options.storage / size
    with Progress(transient=True) as progress:
        copy, chosen, told = prepare(size, cache, folder, options.only, progress)
        for row in told:
            if store.row(row["method"], row["seed"]) is None:
                store.add(row)
        task = progress.add_task(f"{size}: rounds", total=options.rounds * len(chosen))
        for number in range(options.rounds):
            for contestant in random.Random(number).sample(chosen, len(chosen)):
                if store.row(contestant.name, number) is None:
                    store.add(one_round(copy, contestant, number, BATCH[size]))
                progress.advance(task)


def prepare(
    size: str, cache: int, folder: Path, only: str, progress: Progress
) -> tuple[Copy, list[Contestant], list[dict[str, Any]]]:
    """The limit, everyone who is there and whose name holds `only`, and rows of those who are not."""
    found = [case for case in cases() if case.codec == "fp16" or any(only in name for name in names(case))]
    task = progress.add_task(f"{size}: working sets", total=len(found) + len(PEERS))
    stored: list[Stored] = []
    for case in found:
        stored.append(make(case, folder, CANVAS[size], samples(size, case, cache)))
        progress.advance(task)
    dense = next(s for s in stored if s.case.codec == "fp16")
    source = np.stack([rows for _, rows, _, _ in sorted(dense.payloads(), key=lambda sample: sample[0])])
    words, rows = dense.words(decoded=False), Rows(BATCH[size], source.shape[1])
    contestants: list[Contestant] = [ours for s in stored for ours in _ways(s) if only in ours.name]
    told = [{"method": s.case.name, "seed": -1, "bytes": s.bytes / source.shape[1]} for s in stored]
    for kind in (kind for kind in PEERS if only in kind.name):
        progress.advance(task)
        if why := kind.missing():
            told.append({"method": kind.name, "seed": -1, "missing": why})
            continue
        peer, done = kind(folder / kind.name.replace(" ", "-")), folder / f"{kind.name}.done"
        if not done.exists():
            shutil.rmtree(peer.folder, ignore_errors=True)
            peer.folder.mkdir(parents=True)
            peer.write(list(source))
            done.touch()
        contestants.append(Library(peer, words, rows))
    return Copy(source, words, rows), contestants, told


def _ways(stored: Stored) -> Iterator[Ours]:
    words = stored.words(decoded=False)
    yield Ours(stored, words, verify="never", ready=False)
    yield Ours(stored, words, verify="always", ready=False)
    if stored.case.codec != "fp16":
        yield Ours(stored, stored.words(decoded=True), verify="never", ready=True)


def one_round(copy: Copy, contestant: Contestant, number: int, batch: int) -> dict[str, Any]:
    """All passes of one contestant, each between two of the copy."""
    row: dict[str, Any] = {"method": contestant.name, "seed": number, "load": round(os.getloadavg()[0], 2)}
    limit = run(copy, number, batch)
    row["copy ms"] = round(1000 * limit.wall, 4)
    if number == 0 and contestant.folder is not None:
        forget(contestant.folder)
        contestant.open()
        row["cold"] = round(limit.wall / run(contestant, number, batch).wall, 4)
        contestant.close()
        limit = run(copy, number, batch)
    contestant.open()
    for name in ("first", "mapped"):
        found, after = run(contestant, number, batch), run(copy, number, batch)
        row[name] = round((limit.wall + after.wall) / 2 / found.wall, 4)
        row[f"{name} by cpu"] = round((limit.cpu + after.cpu) / 2 / found.cpu, 4)
        limit = after
    alone = run(contestant, number, 1, repeat=-(-ONE_BY_ONE // contestant.count))
    contestant.close()
    for kind, seconds in (("", alone.seconds), (" by cpu", alone.busy)):
        p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
        row |= {f"p50{kind}": round(float(p50), 5), f"p99{kind}": round(float(p99), 5)}
    return row


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Medians over the rounds of each contestant, fastest first."""
    of: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["method"], []).append(row)
    measured = {name: found for name, found in of.items() if found[-1]["seed"] >= 0 and "verified" not in name}
    table = Table(title=f"Working set {title}; samples/s as a multiple of the memory copy's", title_justify="left")
    table.add_column("what is read")
    for column in (
        "bytes",
        "cold",
        "first",
        "mapped",
        "by CPU",
        "verified",
        "p50 ms",
        "p99 ms",
        "p99/p50",
        "by CPU ",
        "rounds",
    ):
        table.add_column(column, justify="right")
    for name in sorted(measured, key=lambda n: -_median(measured[n], "mapped")):
        table.add_row(name, *_cells(name, of))
    for name, found in of.items():
        if name not in measured and "missing" in found[0]:
            table.add_row(name, found[0]["missing"])
    copies = [row["copy ms"] for found in measured.values() for row in found]
    loads = [row["load"] for found in measured.values() for row in found]
    Console(width=150 if not os.isatty(1) else None).print(table)
    if copies:
        print(f"memory copy: {median(copies):.3f} ms per sample; load of the machine {min(loads)} .. {max(loads)}")


def _cells(name: str, of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    found = of[name]
    case = name.removesuffix(" staged").removesuffix(" ready")
    yield f"{of[case][0]['bytes']:.4f}" if case != name else "1"
    yield next((f"{row['cold']:.2f}" for row in found if "cold" in row), "-")
    yield from (f"{_median(found, column):.3f}" for column in ("first", "mapped", "mapped by cpu"))
    verified = of.get(f"{name}, verified")
    yield f"{_median(verified, 'mapped'):.3f}" if verified else "-"
    yield from (f"{_median(found, column):.4f}" for column in ("p50", "p99"))
    yield from (f"{median(row[f'p99{kind}'] / row[f'p50{kind}'] for row in found):.1f}" for kind in ("", " by cpu"))
    yield str(len(found))


def _median(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    return median(row[column] for row in rows)


if __name__ == "__main__":
    main()
