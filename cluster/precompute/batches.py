"""Batches of given images in a given view, outside of any order: for whoever looks at images once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.build import Split
from data_sharding.assemble import Assembler, Sample
from data_sharding.batch import Batch
from data_sharding.loader import NO_CACHES


class Assembled:
    """Renders images of a split at the student's and at `factor` times its resolution."""

    def __init__(
        self, split: Split, factor: int, threads: int = 2, initializer: Callable[[], None] | None = None
    ) -> None:
        """`initializer` is called in each of the `threads`."""
        self._split, self._pool = split, ThreadPoolExecutor(threads, "render", initializer)
        factors = () if factor == 1 else (factor,)
        self._assembler = Assembler(
            dataset=split.dataset,
            views=split.views,
            pool=self._pool,
            further_factors=factors,
            caches=NO_CACHES,
            pin=False,
        )

    def batch(self, positions: np.ndarray, view: int, *, same_canvas: bool = False) -> Batch:
        """`same_canvas`: only those that share the first one's canvas."""
        views = self._split.views
        if same_canvas:
            canvas = views.view(int(positions[0]), view).canvas
            positions = np.array([p for p in positions if views.view(int(p), view).canvas == canvas])
        return self.start(positions, view)()

    def start(self, positions: np.ndarray, view: int) -> Callable[[], Batch]:
        """Begin to render; the function that comes back waits for the batch."""
        ids = self._split.dataset.image_ids
        samples = [Sample(position=int(p), view=view, image_id=int(ids[p])) for p in positions]
        return self._assembler.start(samples, None)

    def __enter__(self) -> "Assembled":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
