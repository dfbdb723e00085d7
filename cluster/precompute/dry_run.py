"""What a teacher cache would take and save, for every codec, measured for a second each before a byte is written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import build
from cluster.build import LoadedTeacher
from cluster.config import RunConfig, check, to_tree
from cluster.precompute.keys import cache_folder, largest_key
from cluster.precompute.probe import Speeds, coding_seconds, look, verdict
from data_sharding.cache.cost import BreakEven, NotEnoughSpace, require_space
from data_sharding.cache.plan import estimate_bytes

CODECS = ("fp32", "fp16", "int8", "sparse")
SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One codec."""

    codec: str
    bytes: int
    """Of the whole cache."""
    cost: BreakEven
    fits: str
    """Empty where the disk can hold it, else why not."""

    @property
    def net(self) -> float:
        """Seconds per image that are saved in the end."""
        return self.cost.saved - self.cost.spent


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was found out of one teacher."""

    teacher: str
    speeds: Speeds
    samples: int
    views: int
    writers: int
    offers: tuple[Offer, ...]
    refused: Mapping[str, str]
    """Codec -> why this recipe's methods cannot use it."""

    @property
    def best(self) -> Offer:
        """Of those that fit: what saves most, and of what saves as much to a hundredth the smallest."""
        fitting = [offer for offer in self.offers if not offer.fits] or list(self.offers)
        most = max(offer.net for offer in fitting)
        return min((o for o in fitting if o.net >= most - 0.01 * abs(most)), key=lambda offer: offer.bytes)


def forecast(config: RunConfig, teacher: str, students: int = 1) -> Forecast:
    """Measure where the teacher would run: on a worker with the recipe's threads and, where there is one, a GPU. Ray
    must be started, and the splits packed."""
    import ray

    from cluster.driver import require_resources, wants_gpu

    threads, gpu = config.resources.threads, wants_gpu(config.resources.gpu, 1)
    require_resources(1, threads, gpu)
    kind, each = ("GPU", 1) if gpu else ("CPU", threads)
    of_nodes = [int(node["Resources"].get(kind, 0)) // each for node in ray.nodes() if node["Alive"]]
    beside = max(1, min(config.resources.most_workers, max(of_nodes)))
    task = ray.remote(measured).options(num_cpus=threads, num_gpus=int(gpu))
    return ray.get(task.remote(to_tree(config), teacher, SECONDS, students, beside, sum(of_nodes)))


def measured(
    tree: Mapping[str, Any], teacher: str, seconds: float, students: int, beside: int, writers: int
) -> Forecast:
    """On a worker: every codec of one teacher. `beside`: workers of a machine that share its disk; `writers`: processes
    that fill the cache."""
    import torch

    config = check(tree, source="the driver's recipe")
    torch.set_num_threads(config.resources.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = build.open_train(config)
    student = build.build_student(config, len(train.dataset.categories))
    settings = next(t for t in config.teachers if t.name == teacher)
    loaded = build.load_teacher(settings, train.dataset.categories)
    key, _ = largest_key(config, loaded, student.shapes, train)
    folder = _existing(cache_folder(config, key))
    speeds, looked = look(config, loaded, student, train, folder, device, batch=key.batch, seconds=seconds)
    refused, offers = {}, []
    for name in CODECS:
        if reason := refusal(config, name):
            refused[name] = reason
            continue
        changed, asked = _with_codec(config, loaded, name)
        key, _ = largest_key(changed, asked, student.shapes, train)
        needed = estimate_bytes(key, train.dataset, train.views)
        encode, decode = coding_seconds(key, train, looked, device, seconds)
        cost = verdict(config, train, speeds, needed, gpus=beside, students=students, encode=encode, decode=decode)
        offers.append(Offer(codec=name, bytes=needed, cost=cost, fits=_room(folder, needed)))
    samples = len(train.dataset) * train.views.count
    return Forecast(
        teacher=teacher,
        speeds=speeds,
        samples=samples,
        views=train.views.count,
        writers=writers,
        offers=tuple(offers),
        refused=refused,
    )


def refusal(config: RunConfig, codec: str) -> str:
    """Why the recipe's methods cannot read this codec; empty where they can."""
    everywhere = [name for name, settings in config.distill.items() if not settings.sparse_suffices]
    if not codec.startswith("sparse") or not everywhere:
        return ""
    return f"{' and '.join(everywhere)} {'reads' if len(everywhere) == 1 else 'read'} the whole map"


def rows(found: Forecast) -> list[dict[str, object]]:
    """The table: a line without a cache, and one per codec."""
    without = {"codec": "no cache", "ms per image and step": 1e3 * found.offers[0].cost.online, "speed": 1.0}
    names = ("codec", "GB", "MB each", "minutes to fill", "ms per image and step", "speed", "pays after", "disk")
    lines: list[dict[str, object]] = [{name: without.get(name) for name in names}]
    for offer in found.offers:
        cost, told = offer.cost, (offer.bytes / 1e9, offer.bytes / found.samples / 1e6)
        fill = cost.spent / found.views * found.samples / found.writers
        speeds = (fill / 60, 1e3 * cost.cached, cost.gain, _pays_after(cost))
        lines.append(dict(zip(names, (offer.codec, *told, *speeds, offer.fits or "fits"), strict=True)))
    lines += [dict[str, object]({"codec": name, "pays after": f"cannot: {why}"}) for name, why in found.refused.items()]
    return lines


def told(found: Forecast) -> str:
    """The one sentence below the table."""
    speeds, best = found.speeds, found.best
    measured = (
        f"Measured here: teacher {1e3 * speeds.teacher:.3g} ms and step {1e3 * speeds.step:.3g} ms per image, disk "
        f"{speeds.write / 1e6:.0f} MB/s written and {speeds.read / 1e6:.0f} MB/s read"
    )
    if best.fits:
        return f"{measured}; no codec fits on this disk: {best.fits}."
    advice = f"best is codec {best.codec}" if best.cost.pays else "best is no cache (teachers.N.cache=false)"
    return f"{measured}; {advice}. {best.cost.sentence}"


def _pays_after(cost: BreakEven) -> str:
    return f"{cost.epochs_to_pay:.2g} epochs" if math.isfinite(cost.epochs_to_pay) else "never"


def _with_codec(config: RunConfig, loaded: LoadedTeacher, codec: str) -> tuple[RunConfig, LoadedTeacher]:
    """The recipe and its teacher with one codec for all taps."""
    settings = replace(loaded.config, codec=codec, tap_codecs={})
    teachers = tuple(settings if t.name == settings.name else t for t in config.teachers)
    return replace(config, teachers=teachers), replace(loaded, config=settings)


def _existing(folder: Path) -> Path:
    """The nearest folder that is there: on the same disk."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _room(folder: Path, needed: int) -> str:
    try:
        require_space(folder, needed)
    except NotEnoughSpace as error:
        return str(error).partition(";")[0]
    return ""
