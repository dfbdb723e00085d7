"""Turns image positions and view indices into a Batch, one job per image in a pool of threads.

Decoding, resizing and copying leave the interpreter's lock, so threads suffice. Each job renders into its own row of
the batch, so the result does not depend on how many threads there are or which is first.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_sharding import images
from data_sharding.batch import Batch, Geometry, StoredTaps
from data_sharding.cache.reader import TeacherCache
from data_sharding.shards import PackedDataset
from data_sharding.views import View, ViewTable, photometric, place_labels, render

Labels = tuple[Tensor, Tensor, Tensor]
"""Boxes (N, 4), labels (N,) and ignored regions (R, 4) of one image."""


class LoaderError(RuntimeError):
    """An image could not be loaded."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One place in a batch."""

    position: int
    view: int
    image_id: int
    """What the batch reports: -1 for an image that only fills up the last evaluation batch."""


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """How batches are made from a packed split and its views."""

    dataset: PackedDataset
    views: ViewTable
    pool: Executor
    factor: int = 1
    """The size at which `Batch.images` is rendered."""
    further_factors: tuple[int, ...] = ()
    """The sizes that go into `Batch.scaled_images`."""
    caches: Mapping[str, TeacherCache]
    """Only with `factor` 1: their taps stand on the student's grid."""
    pin: bool = False
    """Whether batches lie in page-locked memory, which only CUDA can allocate."""

    def start(
        self, samples: Sequence[Sample], jitter_key: tuple[object, ...] | None = None, key: tuple[object, ...] = ()
    ) -> Callable[[], Batch]:
        """Hand out the work of one batch; the function that comes back waits for it. `key` becomes the batch's.

        `jitter_key` draws the colours of `Batch.images`, and `scaled_images[1]` then holds the clean pixels.
        Raises LoaderError, from the waiting function, naming the image's file.
        """
        views = [self.views.view(s.position, s.view) for s in samples]
        canvas = views[0].canvas
        if any(v.canvas != canvas for v in views):
            raise ValueError(f"images of one batch must share a canvas, got {sorted({v.canvas for v in views})}")
        jittered = self._pixels(len(samples), canvas, self.factor) if jitter_key else None
        factors = dict.fromkeys((self.factor, *self.further_factors))
        clean = {f: self._pixels(len(samples), canvas, f) for f in factors}
        places = [s.position for s in samples], [s.view for s in samples]
        reads = {name: cache.bring(*places, pin=self.pin) for name, cache in self.caches.items()}
        jobs = [
            self.pool.submit(self._image, i, s, v, clean, jittered, jitter_key)
            for i, (s, v) in enumerate(zip(samples, views, strict=True))
        ]
        taps = {name: self.pool.submit(read) for name, read in reads.items()}

        def wait() -> Batch:
            labels, found = [job.result() for job in jobs], _results(taps)
            for cache in self.caches.values():
                cache.require_same_pixels(*places, clean[1])
            return replace(self._batch(samples, views, clean, jittered, labels, found), key=key)

        return wait

    def _pixels(self, count: int, canvas: tuple[int, int], factor: int) -> Tensor:
        shape = (count, 3, canvas[0] * factor, canvas[1] * factor)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin)

    def _image(
        self,
        row: int,
        sample: Sample,
        view: View,
        clean: Mapping[int, Tensor],
        jittered: Tensor | None,
        jitter_key: tuple[object, ...] | None,
    ) -> Labels:
        name = f"image at position {sample.position}"
        try:
            record = self.dataset.record(sample.position)
            name = f"{record.file_name} (image id {record.image_id})"
            image = images.decode(record.image)
            for factor, pixels in clean.items():
                pixels[row] = render(image, view, factor)
            if jittered is not None and jitter_key is not None:
                key = (*jitter_key, record.image_id)
                jittered[row] = photometric(clean[self.factor][row], view, self.views.config, key)
            boxes, labels, ignore = place_labels(record, view, min_visible=self.views.config.min_visible)
            return boxes * self.factor, labels, ignore * self.factor
        except Exception as error:
            raise LoaderError(f"{name} of split {self.dataset.split!r}, view {view.index}: {error}") from error

    def _batch(
        self,
        samples: Sequence[Sample],
        views: Sequence[View],
        clean: Mapping[int, Tensor],
        jittered: Tensor | None,
        labels: Sequence[Labels],
        taps: Mapping[str, StoredTaps],
    ) -> Batch:
        boxes, classes, ignore = zip(*labels, strict=True)
        geometry = Geometry(views[0].canvas, torch.tensor([v.size for v in views], dtype=torch.int64))
        kept_clean = self.further_factors if jittered is None else (self.factor, *self.further_factors)
        return Batch(
            images=clean[self.factor] if jittered is None else jittered,
            geometry=geometry.scaled(self.factor),
            boxes=boxes,
            labels=classes,
            ignore=ignore,
            image_ids=tuple(s.image_id for s in samples),
            views=tuple(s.view for s in samples),
            scaled_images={f: clean[f] for f in kept_clean},
            cached=taps,
            scales=torch.tensor([_scale(v) for v in views], dtype=torch.float32) * self.factor,
        )


def _scale(view: View) -> tuple[float, float]:
    """Canvas pixels per source pixel, down and across."""
    _, _, width, height = view.crop
    return view.size[0] / height, view.size[1] / width


def _results(futures: Mapping[str, Future[StoredTaps]]) -> dict[str, StoredTaps]:
    return {name: future.result() for name, future in futures.items()}
