"""What the codecs of a teacher cache cost in bytes and in truth: sizes on synthetic boxes, errors on a real teacher.

    python -m benchmarks.cache_codecs
    python -m benchmarks.cache_codecs --name hit_uav --teacher RUN/student --packed STORAGE/data/coco-.../train \\
        --canvas 512 640

Sizes are of 256 channels, P3 to P7 of 800 x 1344 pixels, against dense fp16. Errors are of a teacher's taps on images
of a packed split; the student of the losses is the teacher's map plus noise that is `distance` times as large (L2).
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.assemble import Assembler, Sample
from data_sharding.cache.plan import ROW_OVERHEAD
from data_sharding.codecs.catalogue import CHOICES, CODECS, codec, decode, tap_bytes
from data_sharding.codecs.choice import chosen, measured
from data_sharding.codecs.foreground import foreground_cells, level_sizes
from data_sharding.files import write_atomically
from data_sharding.loader import NO_CACHES
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewConfig, ViewTable
from kd import student as student_files
from kd.blocks.divergence import softened_kl, squared_error
from kd.detectors.base import Detector

CANVAS, STRIDES, CHANNELS = (800, 1344), (8, 16, 32, 64, 128), 256
SHARES = {0.03: 0.021, 0.10: 0.06, 0.30: 0.166}
"""Foreground of P3 -> bytes against dense fp16 that a sparse cache may take."""
BOXES = 40
"""Per image, as in aerial data; then 3 % of P3 are boxes of about 20 px, 30 % of about 80."""
DISTANCES = (0.3, 0.1)
LOSS_GOAL, GRADIENT_GOAL = 0.002, 0.03
"""Of a student at distance 0.3."""
Maps = dict[str, tuple[Tensor, Tensor]]
"""Tap -> map (C, h, w) and foreground (h, w) of one image."""


def main() -> None:
    """The command line."""
    options = _options()
    torch.set_num_threads(1)
    content: dict[str, Any] = {"torch": str(torch.__version__), "sizes": list(sizes())}
    if options.teacher is not None:
        detector, facts = student_files.load(options.teacher)
        settings = {"teacher": facts.sha256[:12], "canvas": list(options.canvas), "images": options.images}
        found = errors(list(teacher_maps(detector, options)))
        content |= {"settings": settings, **found}
    path = options.results or Path(__file__).parent / "results" / f"cache_codecs_{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    print("\n".join(report(content)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="sizes", help="of the file below benchmarks/results")
    parser.add_argument("--teacher", type=Path, help="a `student` folder; without it only sizes are told")
    parser.add_argument("--packed", type=Path, help="a packed split: the folder with manifest.json")
    parser.add_argument("--canvas", type=int, nargs=2, default=(512, 640), metavar=("H", "W"))
    parser.add_argument("--short-side", type=int, help="resize; default: the images' own pixels")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if (options.teacher is None) != (options.packed is None):
        parser.error("--teacher and --packed belong together")
    return options


def sizes() -> Iterator[dict[str, Any]]:
    """Bytes of one sample against dense fp16, Arrow's headers counted, by codec and foreground."""
    cells = [h * w for h, w in level_sizes(CANVAS, STRIDES)]
    whole = sum(tap_bytes(codec("fp16"), CHANNELS, n, n) for n in cells)
    for share in SHARES:
        kept = [int(mask.sum()) for mask in foreground_cells([boxes_covering(share)], CANVAS, STRIDES)]
        found: dict[str, float] = {}
        for name, one in CODECS.items():
            rows = kept if one.sparse else cells
            taps = sum(tap_bytes(one, CHANNELS, k, n) for k, n in zip(rows, cells, strict=True))
            found[name] = (taps + ROW_OVERHEAD) / whole
        levels = [round(k / n, 3) for k, n in zip(kept, cells, strict=True)]
        yield {"foreground": share, "levels": levels, "goal": SHARES[share], "bytes": found}


def boxes_covering(share: float) -> Tensor:
    """(40, 4): forty boxes at random places, whose sides grow together until that share of P3's cells is foreground."""
    generator = torch.Generator().manual_seed(0)
    side = torch.tensor([CANVAS[1], CANVAS[0]])
    centre, half = (
        torch.rand(BOXES, 2, generator=generator) * side,
        2.0 * 2 ** torch.rand(BOXES, 2, generator=generator),
    )
    while True:
        boxes = torch.cat([(centre - half).clamp(min=0), torch.minimum(centre + half, side)], 1)
        if foreground_cells([boxes], CANVAS, STRIDES[:1])[0].float().mean() >= share:
            return boxes
        half = half * 1.01


@torch.no_grad()
def teacher_maps(detector: Detector, options: argparse.Namespace) -> Iterator[Maps]:
    """What the teacher sees of images that are evenly spread over those with objects."""
    dataset = PackedDataset.open(options.packed)
    short = None if options.short_side is None else (options.short_side,)
    views = ViewTable.open_or_draw(
        dataset, ViewConfig(count=1, short_side=short, flip=0.0, buckets=(tuple(options.canvas),))
    )
    shapes, there = detector.shapes, np.flatnonzero(dataset.objects)
    names = ("c5", *(f"p{s.bit_length() - 1}" for s in shapes.strides))
    strides = (shapes.c5_stride, *shapes.strides)
    with ThreadPoolExecutor(1) as pool:
        assembler = Assembler(dataset=dataset, views=views, pool=pool, caches=NO_CACHES)
        for position in there[np.unique(np.linspace(0, len(there) - 1, options.images).round().astype(np.int64))]:
            batch = assembler.start([Sample(position=int(position), view=0, image_id=0)])()
            taps = detector.features(detector.normalise(batch.images, batch.geometry))
            assert taps.c5 is not None
            masks = foreground_cells(batch.boxes, batch.geometry.canvas, strides)
            yield {n: (x[0].float(), m[0]) for n, x, m in zip(names, (taps.c5, *taps.pyramid), masks, strict=True)}


def errors(samples: Sequence[Maps]) -> dict[str, Any]:
    """Relative errors by tap and codec, means over the images, and what `int8` and `sparse` choose."""
    taps = tuple(samples[0])
    choices = {word: _choice(word, taps, samples) for word in CHOICES}
    rows = [
        {"tap": tap, "codec": name, **_means([_of_map(name, *s[tap], tap) for s in samples])}
        for tap in taps
        for name in CODECS
        if name != "fp32"
    ]
    return {"choices": choices, "errors": rows}


def _choice(word: str, taps: tuple[str, ...], samples: Sequence[Maps]) -> dict[str, str]:
    """The codec of each tap where a recipe says `word`."""
    sparse = codec(CHOICES[word][0]).sparse
    given = [[(s[tap][0], s[tap][1] if sparse else None) for tap in taps] for s in samples]
    asked = [word] * len(taps)
    return dict(zip(taps, chosen(asked, measured(asked, taps, given)), strict=True))


def _of_map(name: str, x: Tensor, mask: Tensor, tap: str) -> dict[str, float]:
    """Of one tap of one image; where only foreground is stored, of the foreground alone."""
    shape = (x.shape[0], x.shape[1], x.shape[2])
    back = decode(codec(name).encode(x, mask, level=tap), name, shape, level=tap)
    here = mask.flatten() if codec(name).sparse else torch.ones_like(mask.flatten())
    teacher, stored = (y.flatten(1)[:, here] for y in (x, back))
    if not teacher.numel():
        return {}
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    found = {"l2": _ratio(stored - teacher, teacher)}
    for distance in DISTANCES:
        student = teacher + noise * (distance * teacher.norm() / noise.norm())
        for loss in ("mse", "cwd"):
            (exact, slope), (rounded, its_slope) = (_loss(loss, student, y) for y in (teacher, stored))
            found[f"{loss} {distance}"] = abs(rounded / exact - 1)
            found[f"{loss} gradient {distance}"] = _ratio(its_slope - slope, slope)
    return found


def _loss(kind: str, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The value and its gradient for a (C, P) student."""
    with torch.enable_grad():
        moved = student.clone().requires_grad_()
        terms = squared_error(moved, teacher) if kind == "mse" else softened_kl(moved, teacher, 1.0, dim=1)
        terms.mean().backward()
    assert moved.grad is not None
    return terms.mean().item(), moved.grad


def _ratio(error: Tensor, whole: Tensor) -> float:
    return (error.norm() / whole.norm().clamp(min=1e-30)).item()


def _means(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    kept = [one for one in found if one]
    return {key: mean(one[key] for one in kept) for key in (kept[0] if kept else ())}


def report(content: Mapping[str, Any]) -> Iterator[str]:
    """The tables."""
    yield f"{'bytes against dense fp16':26}" + "".join(f"{name:>16}" for name in CODECS) + "   goal, P3 .. P7"
    for row in content["sizes"]:
        values = "".join(f"{row['bytes'][name]:16.4f}" for name in CODECS)
        levels = " ".join(f"{share:.0%}" for share in row["levels"])
        yield f"{row['foreground']:<26.0%}{values}   {row['goal']} {levels}"
    if "errors" not in content:
        return
    columns = [f"{loss} {d}" for d in DISTANCES for loss in ("mse", "mse gradient", "cwd", "cwd gradient")]
    yield f"\n{content['settings']}; * is what int8 and sparse choose\n"
    yield f"{'tap':4} {'codec':17} {'L2':>7}" + "".join(f"{name:>18}" for name in columns)
    picked = {(tap, name) for choice in content["choices"].values() for tap, name in choice.items()}
    missed = []
    for row in content["errors"]:
        star = "*" if (row["tap"], row["codec"]) in picked else " "
        values = "".join(f"{row[name]:18.3%}" for name in columns)
        yield f"{row['tap']:4} {row['codec']:15}{star:2} {row['l2']:7.2%}{values}"
        good = row["mse 0.3"] <= LOSS_GOAL and row["mse gradient 0.3"] <= GRADIENT_GOAL
        missed += [f"{row['tap']} {row['codec']}"] if star == "*" and not good else []
    told = ", ".join(missed) or "none"
    yield f"\nchosen and beyond {LOSS_GOAL:.1%} of the MSE or {GRADIENT_GOAL:.0%} of its gradient at 0.3: {told}"


if __name__ == "__main__":
    main()
