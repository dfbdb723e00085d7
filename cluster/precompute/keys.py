"""The key of a teacher's cache: what a recipe says of it, and which codecs were measured to err least.

A recipe that leaves the choice between codecs to measurement (`codec: int8`) has one answer. It is kept in a file
beside the caches, which the driver writes before the first shard and everybody else reads.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig
from cluster.grammar import ConfigError
from cluster.precompute.batches import Assembled
from data_sharding.cache.key import CacheKey, canonical_json, library_versions
from data_sharding.codecs.catalogue import codec
from data_sharding.codecs.choice import Errors, candidates, chosen, compared, is_open
from data_sharding.files import write_atomically
from data_sharding.remote import Remote, is_url
from kd.detectors.base import Shapes
from kd.teacher import aligned_shapes

TEACHER_BATCH = 8
"""Images per forward that fills a cache: part of the cache's key."""
CHOICES = "codecs"
"""The folder beside the caches that says which codecs err least."""


def cache_key(config: RunConfig, teacher: LoadedTeacher, student: Shapes, train: Split) -> CacheKey:
    """Everything that decides the bytes of this teacher's cache. ConfigError where codecs were not compared yet."""
    largest, asked = largest_key(config, teacher, student, train)
    if not is_open(asked):
        return largest
    path = choice_path(config, largest, asked)
    try:
        codecs = tuple(json.loads(path.read_bytes())["codecs"])
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: nobody has compared the codecs of teacher {largest.teacher!r} yet; run "
            "`python -m cluster.cache_teacher` with this recipe"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); delete it to compare the codecs again") from None
    if len(codecs) != len(asked) or any(c not in candidates(a) for c, a in zip(codecs, asked, strict=True)):
        raise ConfigError(f"{path} names {codecs} for {asked}; delete it to compare the codecs again")
    return replace(largest, codecs=codecs)


def settled_key(config: RunConfig, teacher: LoadedTeacher, student: Shapes, train: Split) -> tuple[CacheKey, list[str]]:
    """The same, comparing the codecs first where that is not done yet; with what to tell of it, tap by tap. For the
    driver: one process alone."""
    largest, asked = largest_key(config, teacher, student, train)
    told: list[str] = []
    path = choice_path(config, largest, asked)
    if is_open(asked) and not _is_kept(config, path):
        live = build.live_teacher(teacher, student, build.stored_of(config, teacher.config))
        with Assembled(train, teacher.config.factor) as assembled:
            errors = compared(
                largest, asked, train.dataset, train.views, lambda at, view: live(assembled.batch(at, view))
            )
        found = {"codecs": chosen(asked, errors), "taps": largest.taps, "errors": errors}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, canonical_json(found))
        told = [_told(tap, one) for tap, one in zip(largest.taps, errors, strict=True) if one]
    if is_open(asked):
        _share(config, path)
    return cache_key(config, teacher, student, train), told


def largest_key(
    config: RunConfig, teacher: LoadedTeacher, student: Shapes, train: Split
) -> tuple[CacheKey, tuple[str, ...]]:
    """The key with the largest codec wherever the choice is open, for estimates; and the codecs that the recipe asks
    for, in its own words. ConfigError for a tap that is not stored."""
    settings, shapes = teacher.config, aligned_shapes(teacher.detector.shapes, student)
    reads = build.stored_of(config, settings)
    levels = [(f"p{s.bit_length() - 1}", shapes.pyramid_channels, s) for s in shapes.strides]
    stored = [("c5", shapes.c5_channels, shapes.c5_stride)] if "c5" in reads else []
    taps, channels, strides = zip(*(stored + (levels if "pyramid" in reads else [])), strict=True)
    if unknown := sorted(settings.tap_codecs.keys() - set(taps)):
        raise ConfigError(
            f"teachers: {settings.name!r}: tap_codecs names {', '.join(unknown)}, but the taps that this recipe's "
            f"methods read of it are {', '.join(taps)}"
        )
    asked = tuple(str(settings.tap_codecs.get(tap, settings.codec)) for tap in taps)
    codecs = tuple(candidates(name)[-1] for name in asked)
    key = CacheKey(
        dataset_uid=train.dataset.uid,
        views_uid=train.views.uid,
        teacher=settings.name,
        weights_sha256=teacher.sha256,
        mean=tuple(teacher.detector.mean.tolist()),
        std=tuple(teacher.detector.std.tolist()),
        factor=settings.factor,
        align=settings.align,
        taps=taps,
        channels=channels,
        strides=strides,
        canvases=tuple(train.views.buckets),
        codecs=codecs,
        enlarged=_enlarged(config) if any(codec(name).sparse for name in codecs) else None,
        compute_dtype={"fp32": "float32", "bf16": "bfloat16"}[settings.precision],
        batch=TEACHER_BATCH,
        versions=library_versions(),
    )
    return key, asked


def cache_folder(config: RunConfig, key: CacheKey) -> Path:
    """The folder that this key's cache is written to: the one that it is read from, unless that is a URL."""
    return _below(config) / f"{key.teacher}-{key.uid[:12]}"


def choice_path(config: RunConfig, largest: CacheKey, asked: tuple[str, ...]) -> Path:
    """Where the answer is kept which codecs err least, for this very teacher, data and taps."""
    digest = hashlib.sha256(canonical_json([asdict(largest), asked])).hexdigest()
    return _below(config) / CHOICES / f"{largest.teacher}-{digest[:12]}.json"


def _below(config: RunConfig) -> Path:
    caches = config.resources.caches
    return Path(config.storage) / "caches" if caches is None or is_url(caches) else Path(caches)


def _is_kept(config: RunConfig, path: Path) -> bool:
    """Whether the answer is there; where it lies only beside caches behind a URL, it is brought here."""
    caches = config.resources.caches
    if path.exists() or caches is None or not is_url(caches):
        return path.exists()
    try:
        content = Remote(str(caches)).read(f"{CHOICES}/{path.name}")
    except FileNotFoundError:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return True


def _share(config: RunConfig, path: Path) -> None:
    """Put the answer beside caches behind a URL, unless it is there."""
    caches = config.resources.caches
    if caches is None or not is_url(caches):
        return
    far, name = Remote(str(caches)), f"{CHOICES}/{path.name}"
    try:
        far.read(name)
    except FileNotFoundError:
        far.put(path, name)


def _enlarged(config: RunConfig) -> float:
    """What the methods read lies inside boxes enlarged by this. The recipe's check has made sure that they all say."""
    return max(m.reads_within for m in config.distill.values() if m.reads_within is not None)


def _told(tap: str, errors: Errors) -> str:
    """`c5 int8_channel 0.40 % (int8_position 0.74 %)`."""
    first, *rest = sorted(errors, key=lambda one: errors[one])
    others = ", ".join(f"{one} {errors[one]:.2%}" for one in rest)
    return f"{tap} {first} {errors[first]:.2%} ({others})"
