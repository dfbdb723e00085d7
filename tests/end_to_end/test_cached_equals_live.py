"""A cached teacher is a live one, to the bit in fp32: over aspect ratios, odd sizes, views, epochs and batch mates."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_sharding.assemble import Assembler, Sample
from data_sharding.batch import Batch, Geometry, StoredTaps, Taps
from data_sharding.cache.key import CacheKey
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.datasets.base import Source
from data_sharding.loader import NO_CACHES, Loader, order_of
from data_sharding.order import Order, view_of
from data_sharding.pack import pack
from data_sharding.record import Category, Record
from data_sharding.shards import PackedDataset
from data_sharding.tiles import Tiles
from data_sharding.views import ViewConfig, ViewTable
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.backbones import mobilenetv2
from kd.blocks.align import Rule
from kd.clock import Clock
from kd.detectors import fcos
from kd.detectors.base import Detector
from kd.distiller import Distiller, Lesson
from kd.engine import PlainEngine
from kd.methods import scalekd
from kd.methods.base import Pair
from kd.optimise import OptimConfig
from kd.step import StepReport, train_step
from kd.teacher import CachedTeacher, LiveTeacher, Teacher
from tests.kd import runs

SIZES = ((121, 87), (257, 101), (90, 201), (333, 127), (64, 65), (175, 173), (40, 255))
CANVASES = ((128, 128), (128, 256), (256, 128))
IMAGES, VIEWS, EPOCHS, BATCH, TEACHER_BATCH = 10, 3, 5, 4, 3
LEVELS = ("c5", "p3", "p4", "p5", "p6")


@dataclass(frozen=True, kw_only=True)
class Case:
    factor: int
    rule: Rule = "shift"
    crop: tuple[int, int] | None = None
    tiles: Tiles | None = None
    scale: tuple[float, float] = (0.8, 1.1)
    flip: float = 0.5
    photometric: Literal["none", "student_only"] = "none"
    accumulate: int = 1


CASES = {
    "1x, one image a micro-batch": Case(factor=1, accumulate=BATCH),
    "2x shift": Case(factor=2),
    "2x pool, crops": Case(factor=2, rule="pool", crop=(75, 111)),
    "1x, student's colours jittered": Case(factor=1, photometric="student_only"),
    "1x, quadrants": Case(factor=1, tiles=Tiles(grid=(2, 2))),
    "2x, overlapping tiles": Case(factor=2, tiles=Tiles(size=(80, 130), overlap=0.2), flip=0.0),
    "1x, nothing but flips": Case(factor=1, scale=(1.0, 1.0)),
    "1x, nothing but scales": Case(factor=1, flip=0.0),
}
"""Every kind of view, alone or with others."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A packed split under views, a teacher, and its finished cache."""

    case: Case
    dataset: PackedDataset
    views: ViewTable
    order: Order
    live: LiveTeacher
    cache: TeacherCache

    def batches(self, *, cached: bool, steps: int, accumulate: int | None = None) -> list[tuple[Batch, ...]]:
        """The batches of the first steps, with the taps of the cache or with what a live teacher looks at."""
        given: dict[str, Any] = {"caches": {"big": self.cache}} if cached else {"factors": _factors(self.case)}
        with Loader(
            self.dataset,
            self.views,
            self.order,
            world=World(),
            accumulate=accumulate or self.case.accumulate,
            threads=1,
            **given,
        ) as loader:
            return list(islice(loader, steps))

    @property
    def steps(self) -> int:
        return self.order.step_of(max(EPOCHS, self.views.count))


def record(number: int) -> Record:
    """A smooth picture of an odd size with some noise; every fourth has no objects."""
    random = np.random.Generator(np.random.Philox(key=number))
    width, height = SIZES[number % len(SIZES)]
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int16) + random.integers(-30, 30, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG", compress_level=0)
    objects = number % 4
    corners = random.uniform(0, min(width, height) - 24, (objects, 2))
    return Record(
        image_id=500 + number,
        file_name=f"{number}.png",
        width=width,
        height=height,
        image=file.getvalue(),
        boxes=np.concatenate([corners, corners + random.uniform(6, 24, (objects, 2))], 1).astype(np.float32),
        labels=np.arange(objects, dtype=np.int64) % 2,
        annotation_ids=np.arange(objects, dtype=np.int64),
        areas=np.full(objects, 100, np.float32),
        crowd=np.zeros(objects, np.bool_),
        difficult=np.zeros(objects, np.bool_),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    source = Source(count=IMAGES, fingerprint=hashlib.sha256(b"odd sizes").hexdigest(), read=record)
    module = SimpleNamespace(source=lambda *_: source, categories=lambda _: (Category(1, "left"), Category(2, "right")))
    return pack(None, cast("Any", module), "train", tmp_path_factory.mktemp("packed"), 600_000)


@pytest.fixture(scope="module")
def filled(dataset: PackedDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Taught]:
    """A case by its name, its cache filled when it is first asked for."""
    done: dict[str, Taught] = {}

    def get(name: str) -> Taught:
        if name not in done:
            done[name] = fill(CASES[name], dataset, tmp_path_factory.mktemp("cache"))
        return done[name]

    return get


def fill(case: Case, dataset: PackedDataset, folder: Path) -> Taught:
    config = ViewConfig(
        count=1 if case.tiles else VIEWS, crop=case.crop, tiles=case.tiles, short_side=(90, 127), long_side=256,
        scale=case.scale, flip=case.flip, buckets=CANVASES, photometric=case.photometric,
        brightness=0.5,
    )  # fmt: skip
    views = ViewTable.open_or_draw(dataset, config)
    live = LiveTeacher(
        detector(1, width=48), detector(0).shapes, factor=case.factor, rule=case.rule, reads=scalekd.Loss.reads
    )
    key = CacheKey(
        dataset_uid=dataset.uid, views_uid=views.uid, teacher="big", weights_sha256="0" * 64,
        mean=tuple(live.detector.mean.tolist()), std=tuple(live.detector.std.tolist()),
        factor=case.factor, align=case.rule, taps=LEVELS,
        channels=(live.shapes.c5_channels, *[live.shapes.pyramid_channels] * 4),
        strides=(live.shapes.c5_stride, *live.shapes.strides),
        canvases=views.buckets, codecs=("fp32",) * len(LEVELS), batch=TEACHER_BATCH,
    )  # fmt: skip
    writer = CacheWriter(folder, key, dataset, views)
    with ThreadPoolExecutor(1) as pool:
        assembler = Assembler(dataset=dataset, views=views, pool=pool, further_factors=_factors(case), caches=NO_CACHES)

        def taps_of(positions: np.ndarray, view: int) -> Taps:
            ids = dataset.image_ids
            return live(
                assembler.start([Sample(position=int(p), view=view, image_id=int(ids[p])) for p in positions])()
            )

        for shard in writer.pending():
            writer.fill(shard, taps_of)
    writer.finish()
    order = order_of(dataset, views, seed=0, batch=BATCH, window=2)
    return Taught(case=case, dataset=dataset, views=views, order=order, live=live, cache=TeacherCache.open(folder, key))


def detector(seed: int, width: int = 32) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = mobilenetv2.Config(width_mult=0.25, norm="group")
        return fcos.build(fcos.Config(backbone=backbone, width=width, head_depth=1, levels=(3, 4, 5, 6)), 2)


def _factors(case: Case) -> tuple[int, ...]:
    return (case.factor,) if case.factor > 1 else ()


def tensors(taps: Taps) -> list[Tensor]:
    assert taps.c5 is not None
    return [taps.c5, *taps.pyramid]


def same(a: Taps, b: Taps) -> bool:
    """Equal to the bit, and laid out alike in memory: both decide the student's losses to the bit."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype for x, y in pairs)


def seen(taught: Taught, steps: int) -> Iterator[tuple[Batch, Taps, Taps]]:
    """Per micro-batch: the batch, the cached taps, the live ones."""
    cached = CachedTeacher("big", taught.live.shapes)
    both = ([micro for step in taught.batches(cached=c, steps=steps) for micro in step] for c in (True, False))
    for stored, batch in zip(*both, strict=True):
        assert (stored.image_ids, stored.views) == (batch.image_ids, batch.views)
        yield batch, cached(stored), taught.live(batch)


@pytest.mark.parametrize("name", CASES)
def test_cached_equals_live_in_every_view(filled: Callable[[str], Taught], name: str) -> None:
    taught = filled(name)
    shown: list[tuple[int, int]] = []
    canvases, empty, flips = set(), 0, set()
    for batch, cached, live in seen(taught, taught.steps):
        assert same(cached, live)
        canvases.add(batch.geometry.canvas)
        shown += zip(batch.image_ids, batch.views, strict=True)
        empty += sum(len(boxes) == 0 for boxes in batch.boxes)
        flips |= {bool(taught.views.view(i - 500, v).flip) for i, v in zip(batch.image_ids, batch.views, strict=True)}
        jittered = 1 in batch.scaled_images and not torch.equal(batch.images, batch.scaled_images[1])
        assert jittered == (taught.case.photometric == "student_only")
    assert len(canvases) > 1
    assert len(set(shown)) == IMAGES * taught.views.count, "every image in every view"
    assert empty
    assert flips == ({True, False} if taught.case.flip else {False})
    crops = {taught.views.view(i - 500, v).crop for i, v in shown}
    assert len(crops) > len(SIZES) or not (taught.case.crop or taught.case.tiles), "views show parts of images"


@pytest.mark.parametrize("name", CASES)
def test_every_view_comes_once_and_an_epoch_reads_whole_shards(filled: Callable[[str], Taught], name: str) -> None:
    """Whatever the views are: an image's repeats, which fill up a canvas's last batch, show it in the epoch's view."""
    taught = filled(name)
    order, views, groups = taught.order, taught.views.count, taught.dataset.groups
    shown: set[tuple[int, int]] = set()
    for epoch in range(views):
        pairs = set()
        for step in range(order.step_of(epoch), order.step_of(epoch + 1)):
            at, row = order.global_batch(step)
            assert at == epoch
            pairs |= set(zip(row.tolist(), view_of(groups[row], epoch, views).tolist(), strict=True))
        assert {image for image, _ in pairs} == set(range(IMAGES))
        assert len(pairs) == IMAGES
        assert not pairs & shown
        shown |= pairs
        by_group = {(int(groups[image]), view) for image, view in pairs}
        assert len(by_group) == len(np.unique(groups)), "one view per group: whole shards of that view"
    assert len(shown) == IMAGES * views


def swapped(x: Tensor) -> Tensor:
    """The taps of the first and the last image of the batch, exchanged."""
    return x[[-1, *range(1, len(x) - 1), 0]]


MISTAKES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "two images swapped": swapped,
    "flipped": lambda x: x.flip(3),
    "one row too low": lambda x: x.roll(1, 2),
    "one column to the right": lambda x: x.roll(1, 3),
    "one bit": lambda x: x.view(torch.int32).bitwise_xor(torch.ones(1, dtype=torch.int32)).view(torch.float32),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_in_any_level_of_any_batch_is_noticed(filled: Callable[[str], Taught], mistake: str) -> None:
    tried = 0
    for batch, cached, live in seen(filled("2x shift"), 8):
        assert same(cached, live)
        if batch.image_ids[0] == batch.image_ids[-1]:  # a canvas's last batch is filled up with what it has
            continue
        tried += 1
        for level in range(len(LEVELS)):
            maps = tensors(cached)
            maps[level] = torch.empty_like(maps[level]).copy_(MISTAKES[mistake](maps[level]))
            assert not same(Taps(maps[0], tuple(maps[1:])), live), f"{mistake} in {LEVELS[level]}"
    assert tried >= 4


def test_a_pyramid_that_is_one_level_off_is_noticed(filled: Callable[[str], Taught]) -> None:
    """`pool` keeps the teacher's levels where they are, `shift` takes the next one: the same shapes, other values."""
    taught = filled("2x shift")
    unshifted = LiveTeacher(taught.live.detector, detector(0).shapes, factor=2, rule="pool", reads=scalekd.Loss.reads)
    for batch, cached, live in seen(taught, 3):
        off = unshifted(batch)
        for x, y, z in zip(cached.pyramid, live.pyramid, off.pyramid, strict=True):
            assert torch.equal(x, y)
            assert x.shape == z.shape
            assert not torch.equal(x, z)


@pytest.mark.parametrize(("threads", "most"), [(1, 17), (2, 3)])
def test_an_images_taps_do_not_depend_on_its_batch_mates(threads: int, most: int) -> None:
    """Torch changes algorithms at 2 and at 16 images, and with two threads from even numbers to odd ones."""
    small = runs.detector(1)  # few operations: with more threads than free processors each one waits for them
    live = LiveTeacher(small, small.shapes, factor=1, rule="shift", reads=scalekd.Loss.reads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (most, 3, 128, 128), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[128 - i, 91 + i] for i in range(most)])
    torch.set_num_threads(threads)
    try:
        alone = [live(batch_of(images[i : i + 1], sizes[i : i + 1])) for i in range(most)]
        for count in (2, 3, most):
            together = live(batch_of(images[:count], sizes[:count]))
            for i in range(count):
                parts = zip(tensors(together), tensors(alone[i]), strict=True)
                assert all(torch.equal(x[i : i + 1], y) for x, y in parts), f"image {i} of {count}"
    finally:
        torch.set_num_threads(1)


def batch_of(images: Tensor, sizes: Tensor) -> Batch:
    none = (torch.zeros(0, 4),) * len(images)
    labels = (torch.zeros(0, dtype=torch.int64),) * len(images)
    canvas = (images.shape[2], images.shape[3])
    ids = tuple(range(len(images)))
    return Batch(images, Geometry(canvas, sizes), none, labels, none, image_ids=ids, views=ids)


def trained(taught: Taught, *, cached: bool, accumulate: int) -> tuple[list[StepReport], dict[str, Tensor], Tensor]:
    """Three steps of ScaleKD: the reports, the student and the assistant's weights after them."""
    batches = taught.batches(cached=cached, steps=3, accumulate=accumulate)
    config = scalekd.Config(
        start=0.0, freeze=0.0, alpha=1.0, beta=1.0, gamma=1.0, sdf=scalekd.Sdf(width=16, token_width=8)
    )
    student = detector(0).train()
    pair = Pair(student=student.shapes, teacher=taught.live.shapes, accumulate=accumulate)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        loss = scalekd.Loss(config, pair)
        assistant = AssistantTrainer(scalekd.Assistant(config, pair), World())
    optim = OptimConfig(
        optimizer="adamw", lr=1e-3, steps=3, batch=BATCH, accumulate=accumulate, warmup=0, clip_norm=1.0
    )
    engine = PlainEngine(
        Distiller(student, {"scalekd": (Lesson(name="scalekd", teacher="big", config=config), loss)}), optim
    )
    teacher: Teacher = CachedTeacher("big", taught.live.shapes) if cached else taught.live
    reports = [
        train_step(engine, micro, {"big": teacher}, {"scalekd": assistant}, optim, step, World(), Clock())
        for step, micro in enumerate(batches)
    ]
    weights = torch.cat([p.detach().flatten() for p in assistant.assistant.parameters()])
    return reports, engine.student_state(), weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_three_steps_of_scalekd_are_equal_to_the_bit(filled: Callable[[str], Taught], accumulate: int) -> None:
    taught = filled("2x shift")
    (reports, student, assistant), (its_reports, its_student, its_assistant) = (
        trained(taught, cached=cached, accumulate=accumulate) for cached in (True, False)
    )
    assert [r.losses for r in reports] == [r.losses for r in its_reports]
    assert {"kd/scalekd/feat", "kd/scalekd/cls", "kd/scalekd/box"} <= reports[0].losses.keys()
    assert [r.norm for r in reports] == [r.norm for r in its_reports]
    assert all(torch.equal(student[name], its_student[name]) for name in student)
    assert torch.equal(assistant, its_assistant)


def test_steps_with_a_wrong_cache_differ(filled: Callable[[str], Taught]) -> None:
    """The comparison of whole steps notices a single map that is flipped."""
    taught = filled("2x shift")
    right, _, _ = trained(taught, cached=True, accumulate=1)

    class Wrong:
        key = taught.cache.key
        staging = None
        require_same_pixels = staticmethod(taught.cache.require_same_pixels)

        def bring(self, *args: Any, **settings: Any) -> Callable[[], StoredTaps]:
            read = taught.cache.bring(*args, **settings)
            return lambda: flipped(read())

    def flipped(taps: StoredTaps) -> StoredTaps:
        first = taps.pyramid[0]
        levels = [x.flip(3).permute(0, 2, 3, 1).flatten(1, 2) for x in first.maps()]
        return StoredTaps(taps.c5, (replace(first, values=torch.cat(levels, 1).flatten(0, 1)), *taps.pyramid[1:]))

    wrong, _, _ = trained(replace(taught, cache=cast("Any", Wrong())), cached=True, accumulate=1)
    assert right[0].losses != wrong[0].losses
