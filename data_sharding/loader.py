"""Batches for training and for evaluation, made by threads ahead of the step that needs them."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import MappingProxyType, TracebackType

import numpy as np

from data_sharding.assemble import Assembler, Sample
from data_sharding.batch import Batch
from data_sharding.cache.reader import TeacherCache
from data_sharding.look_ahead import LookAhead
from data_sharding.order import Order, rank_slice, view_of
from data_sharding.prefetch import Prefetched
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from data_sharding.world import World

NO_CACHES: Mapping[str, TeacherCache] = MappingProxyType({})


def order_of(
    dataset: PackedDataset, views: ViewTable, *, seed: int, batch: int, window: int = 16, lanes: int = 1
) -> Order:
    """The order of a run over a packed split: in epoch e each image is seen in view `view_of(its group, e, K)`."""
    first = view_of(dataset.groups, 0, views.count)

    def canvas_ids(epoch: int) -> np.ndarray:
        return views.canvas_ids((first + epoch) % views.count)

    return Order(dataset.groups, canvas_ids, seed=seed, batch=batch, window=window, lanes=lanes)


class Loader(Iterator[tuple[Batch, ...]]):
    """This rank's micro-batches of step after step, for ever; a step number is all that is needed to resume.

    With `photometric: student_only` the colours of `Batch.images` are jittered and `Batch.scaled_images[1]` holds the
    clean pixels, which is what a live teacher must see; without, they are the same pixels and only `images` is filled.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        views: ViewTable,
        order: Order,
        *,
        world: World,
        accumulate: int = 1,
        factors: tuple[int, ...] = (),
        caches: Mapping[str, TeacherCache] = NO_CACHES,
        start_step: int = 0,
        prefetch: int = 2,
        threads: int = 2,
        pin: bool = False,
        ahead: int = 4,
    ) -> None:
        """`factors`: resolutions other than 1 of live teachers. `prefetch`: steps made ahead. `pin`: only with CUDA.
        `ahead`: shards fetched before their first use, of caches that lie elsewhere.

        Ranks and micro-batches that cannot share the global batch evenly differ by one image.

        Raises ValueError where there are more of them than images, a cache belongs to other images or views, or a
        staging folder cannot hold what the order needs at one time.
        """
        _require_enough(order.batch, world, accumulate)
        _require_matching(dataset, views, factors, caches)
        self.dataset, self.views, self.order = dataset, views, order
        self.world, self.accumulate = world, accumulate
        self.step = start_step
        """The step that comes next: the whole state of the loader."""
        staged = [cache for cache in caches.values() if cache.staging is not None]
        self._look_aheads = [self._look_ahead(cache, ahead, prefetch) for cache in staged]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._assembler = Assembler(
            dataset=dataset, views=views, pool=self._pool, further_factors=factors, caches=caches, pin=pin
        )
        self._steps = Prefetched(map(self._start, count(start_step)), prefetch)
        self._closed = False

    def _look_ahead(self, cache: TeacherCache, ahead: int, prefetch: int) -> LookAhead:
        groups, views = self.dataset.groups, self.views.count
        return LookAhead(cache, self.order, views, self.world, shards=ahead, behind=prefetch + 1, groups=groups)

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for data so far."""
        return self._steps.wait_seconds

    def __next__(self) -> tuple[Batch, ...]:
        if self._closed:
            raise RuntimeError("this loader is closed; make a new one with start_step")
        try:
            batches = next(self._steps)
        except BaseException:
            self.close()
            raise
        self.step += 1
        return batches

    def close(self) -> None:
        """Drop what is in flight and end the threads."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, step: int) -> Callable[[], tuple[Batch, ...]]:
        for look_ahead in self._look_aheads:
            look_ahead.at(step)
        epoch, row = self.order.global_batch(step)
        mine = self.order.rank_rows(row, self.world)
        views = view_of(self.dataset.groups[mine], epoch, self.views.count)
        ids = self.dataset.image_ids[mine]
        samples = [
            Sample(position=int(p), view=int(v), image_id=int(i)) for p, v, i in zip(mine, views, ids, strict=True)
        ]
        key = None if self.views.config.photometric == "none" else (self.order.seed, "colours", epoch)
        draws = (self.order.seed, epoch)
        micro = (World(rank=i, size=self.accumulate) for i in range(self.accumulate))
        waits = [self._assembler.start(samples[rank_slice(len(samples), m)], key, draws) for m in micro]
        return lambda: tuple(wait() for wait in waits)


def evaluation_batches(
    dataset: PackedDataset,
    views: ViewTable,
    *,
    world: World,
    batch: int,
    factor: int = 1,
    threads: int = 2,
    prefetch: int = 2,
    pin: bool = False,
    first: int | None = None,
) -> Iterator[Batch]:
    """This rank's part of a split, every image in view 0, rendered `factor` times as large (geometry and boxes too).
    `first`: only that many images, by their ids.

    Every rank gets equally many batches of `batch` images; what fills them up has image id -1 and is to be dropped.
    """
    _require_matching(dataset, views, (), NO_CACHES)
    canvases = views.canvas_ids(np.zeros(len(dataset), np.int64))
    with ThreadPoolExecutor(threads, thread_name_prefix="evaluation") as pool:
        assembler = Assembler(dataset=dataset, views=views, pool=pool, factor=factor, caches=NO_CACHES, pin=pin)
        plan = evaluation_plan(canvases, dataset.image_ids, batch, world, first)
        try:
            yield from Prefetched(map(assembler.start, plan), prefetch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def evaluation_plan(
    canvases: np.ndarray, image_ids: np.ndarray, batch: int, world: World, first: int | None = None
) -> list[list[Sample]]:
    """The batches of one rank: one canvas each, all full, equally many on every rank."""
    if batch < 1:
        raise ValueError(f"expected an evaluation batch of at least 1 image, got {batch}")
    plan: list[list[Sample]] = []
    chosen_ids = np.isin(image_ids, np.sort(image_ids)[:first])
    for canvas in np.unique(canvases[chosen_ids]):
        positions = np.flatnonzero((canvases == canvas) & chosen_ids)
        for start in range(0, len(positions), batch):
            chosen = positions[start : start + batch]
            samples = [Sample(position=int(p), view=0, image_id=int(image_ids[p])) for p in chosen]
            plan.append(samples + [_filler(samples[0])] * (batch - len(samples)))
    missing = -len(plan) % world.size
    plan += [[_filler(plan[0][0])] * batch for _ in range(missing)]
    return plan[world.rank :: world.size]


def _filler(sample: Sample) -> Sample:
    return Sample(position=sample.position, view=sample.view, image_id=-1)


def _require_enough(batch: int, world: World, accumulate: int) -> None:
    if accumulate < 1 or batch < world.size * accumulate:
        raise ValueError(
            f"the global batch of {batch} images cannot be shared by {world.size} rank(s) times {accumulate} "
            f"accumulated micro-batch(es): it must be at least {world.size * accumulate}"
        )


def _require_matching(
    dataset: PackedDataset, views: ViewTable, factors: tuple[int, ...], caches: Mapping[str, TeacherCache]
) -> None:
    if len(views) != len(dataset):
        raise ValueError(f"the views describe {len(views)} images, the data set has {len(dataset)}")
    if any(f < 2 for f in factors):
        raise ValueError(f"factors are resolutions of live teachers above the student's, got {factors}")
    for name, cache in caches.items():
        found, asked = (cache.key.dataset_uid, cache.key.views_uid), (dataset.uid, views.uid)
        if found != asked:
            raise ValueError(
                f"the cache of teacher {name!r} holds (data set, views) {found}, these images are {asked}; "
                "open it with this run's key"
            )
