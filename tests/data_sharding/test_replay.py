"""A cache is read beside the pixels that the teacher saw, or not at all."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_sharding import images
from data_sharding.batch import Taps
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.replay import ReplayDiffers, difference, sampled
from data_sharding.cache.writer import CacheWriter, Seen
from data_sharding.loader import Loader, order_of
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable, render
from data_sharding.world import World
from tests.data_sharding.tiny import tiny_key, tiny_taps


def test_samples_lie_on_a_grid_over_the_valid_area_and_colours_take_turns() -> None:
    image = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    for colour in range(3):
        image[colour, :16, :24] = torch.arange(16, dtype=torch.uint8)[:, None] * 10 + colour
    found = np.frombuffer(sampled(image, (16, 24)), np.uint8).reshape(8, 8)
    assert (found // 10 == (2 * np.arange(8) + 1)[:, None]).all(), "nothing of the padding"
    assert (found % 10 == (np.arange(8)[:, None] + np.arange(8)) % 3).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 128), (128, 5)])
def test_views_of_a_few_pixels_are_sampled_too(size: tuple[int, int]) -> None:
    assert len(sampled(torch.zeros(3, 128, 128, dtype=torch.uint8), size)) == 64


def test_rounding_is_no_difference_and_a_mirrored_or_shifted_image_is() -> None:
    image = torch.from_numpy(np.random.Generator(np.random.Philox(1)).integers(0, 255, (3, 64, 64), np.uint8))
    kept = sampled(image, (64, 64))
    assert difference(kept, kept) == 0
    assert difference(kept, sampled(image + 1, (64, 64))) == 1
    assert difference(kept, sampled(image.flip(2), (64, 64))) > 20
    assert difference(kept, sampled(image.roll(1, 2), (64, 64))) > 20


@pytest.fixture
def cache(tmp_path: Path, dataset: PackedDataset, views: ViewTable) -> TeacherCache:
    """What a teacher saw of the very pixels that the views say."""
    key = tiny_key(dataset, views)
    writer, taps_of = CacheWriter(tmp_path, key, dataset, views), tiny_taps(key, views)

    def look(positions: np.ndarray, view: int) -> Seen:
        pixels = [render(images.decode(dataset.record(i).image), views.view(i, view)) for i in positions.tolist()]
        return Seen(taps_of(positions, view), torch.stack(pixels))

    for shard in writer.pending():
        writer.fill(shard, look)
    writer.finish()
    return TeacherCache.open(tmp_path, key)


def read(dataset: PackedDataset, views: ViewTable, cache: TeacherCache) -> list[Taps]:
    order = order_of(dataset, views, seed=0, batch=4)
    with Loader(dataset, views, order, world=World(), caches={"big": cache}) as loader:
        return [batch.cached["big"].decode() for (batch,) in islice(loader, order.step_of(2))]


def test_the_same_pixels_are_read(dataset: PackedDataset, views: ViewTable, cache: TeacherCache) -> None:
    assert len(read(dataset, views, cache)) > 0


def test_other_pixels_are_told_with_the_versions(
    dataset: PackedDataset, views: ViewTable, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resizer or a decoder that changed under the cache: here one that mirrors."""
    monkeypatch.setattr("data_sharding.assemble.render", lambda i, v, f=1: render(i, replace(v, flip=not v.flip), f))
    with pytest.raises(ReplayDiffers, match=r"view \d of image id \d+ differs by .* grey levels .*'pillow'"):
        read(dataset, views, cache)


def test_who_verifies_nothing_is_told_nothing(
    dataset: PackedDataset, views: ViewTable, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_sharding.assemble.render", lambda i, v, f=1: render(i, replace(v, flip=not v.flip), f))
    assert len(read(dataset, views, TeacherCache.open(cache.folder, cache.key, verify="never"))) > 0
