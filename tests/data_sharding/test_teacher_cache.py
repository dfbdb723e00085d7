import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_sharding.batch import Taps
from data_sharding.cache.foreground import foreground_masks, foreground_rows
from data_sharding.cache.key import CacheKey
from data_sharding.cache.plan import estimate_bytes, plan, sample_sizes
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.codecs.catalogue import CODECS, CodecError, codec, decode
from data_sharding.codecs.foreground import foreground_cells
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable, place_labels
from tests.data_sharding.tiny import content, one_canvas, read, tensors, tiny_key, tiny_taps, write


def with_codec(key: CacheKey, name: str) -> CacheKey:
    return replace(key, codecs=(name,) * len(key.taps), enlarged=1.2 if codec(name).sparse else None)


def masks_of(
    key: CacheKey, dataset: PackedDataset, views: ViewTable, positions: np.ndarray, view: int
) -> tuple[torch.Tensor, ...]:
    """(B, h, w) bool per tap: what a sparse codec keeps."""
    masks = foreground_masks(with_codec(key, "sparse_channel"), dataset, views, positions.tolist(), view)
    return tuple(mask for mask in masks if mask is not None)


def test_every_image_is_planned_once_per_view_in_batches_of_one_canvas(
    key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    shards = plan(key, dataset, views)
    assert len({s.id for s in shards}) == len(shards)
    for view in range(2):
        canvases = views.canvas_ids(np.full(len(dataset), view))
        mine = [s for s in shards if s.view == view]
        assert sorted(i for s in mine for i in s.positions) == list(range(len(dataset)))
        for shard in mine:
            assert len(set(dataset.groups[list(shard.positions)].tolist())) == 1
            assert all(len(set(canvases[list(b)].tolist())) == 1 and len(b) <= key.batch for b in shard.batches)
            size = sample_sizes(key, dataset, views, view)[list(shard.positions)].sum()
            assert size <= key.shard_bytes or len(shard.batches) == 1


def test_a_key_of_other_images_is_refused_before_anything_is_written(
    tmp_path: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    with pytest.raises(ValueError, match="dataset_uid: key has 'other', given is"):
        CacheWriter(tmp_path / "taps", replace(key, dataset_uid="other"), dataset, views)
    assert not (tmp_path / "taps").exists()


@pytest.mark.parametrize("coding", CODECS)
def test_the_estimate_is_close(tmp_path: Path, dataset: PackedDataset, views: ViewTable, coding: str) -> None:
    key = with_codec(tiny_key(dataset, views, channels=(512, 512, 512), shard_bytes=2**20), coding)
    write(tmp_path, key, dataset, views)
    assert estimate_bytes(key, dataset, views) == pytest.approx(sum(map(len, content(tmp_path).values())), rel=0.03)


@pytest.mark.parametrize("coding", CODECS)
def test_what_was_written_is_read(tmp_path: Path, dataset: PackedDataset, views: ViewTable, coding: str) -> None:
    """Exactly what the codec makes of the live taps; fp32 makes nothing of them."""
    key = with_codec(tiny_key(dataset, views), coding)
    write(tmp_path, key, dataset, views)
    cache = TeacherCache.open(tmp_path, key)
    assert len(cache) == 2 * len(dataset)
    for view in range(2):
        positions = one_canvas(views, view)[::-1].copy()
        stored = cache.read(positions, [view] * len(positions))
        found, expected = stored.decode(), tiny_taps(key, views)(positions, view)
        assert stored.c5 is not None
        assert stored.c5.values.dtype == codec(coding).dtype
        assert len(found.pyramid) == 2
        masks = masks_of(key, dataset, views, positions, view)
        for x, y, mask in zip(tensors(found), tensors(expected), masks, strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            for row in range(len(positions)):
                encoded = codec(coding).encode(y[row], mask[row], level="any")
                again = decode(encoded, coding, (y.shape[1], y.shape[2], y.shape[3]), level="any")
                assert torch.equal(x[row], again)
                assert coding != "fp32" or torch.equal(x[row], y[row])
                assert not codec(coding).sparse or (x[row, :, ~mask[row]] == 0).all()


def test_a_sparse_cache_holds_the_boxes_of_the_view_and_no_ignored_region(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable
) -> None:
    key = with_codec(tiny_key(dataset, views), "sparse_position")
    for view in range(2):
        counted = foreground_rows(key, dataset, views, view)
        for position in range(len(dataset)):
            record, shown = dataset.record(position), views.view(position, view)
            boxes, _, ignored = place_labels(record, shown, min_visible=views.config.min_visible)
            assert (counted[position] > 0).all() == (len(boxes) > 0)
            masks = foreground_cells([boxes], shown.canvas, key.strides, 1.2)
            assert counted[position].tolist() == [int(m.sum()) for m in masks]
            both = foreground_cells([torch.cat([boxes, ignored])], shown.canvas, key.strides, 1.2)
            if len(ignored):
                assert any(int(m.sum()) > n for m, n in zip(both, counted[position], strict=True))


def test_a_cache_may_hold_the_last_stage_or_the_pyramid_alone(
    tmp_path: Path, dataset: PackedDataset, views: ViewTable
) -> None:
    for taps in (("c5",), ("p3", "p4")):
        key = tiny_key(
            dataset,
            views,
            taps=taps,
            channels=(3,) * len(taps),
            strides=(32, 64)[: len(taps)],
            codecs=("fp16",) * len(taps),
        )
        write(tmp_path / taps[0], key, dataset, views)
        found = TeacherCache.open(tmp_path / taps[0], key).read([0], [0]).decode()
        assert (found.c5 is None, len(found.pyramid)) == ((False, 0) if taps == ("c5",) else (True, 2))


def test_few_open_shards_and_another_process_read_the_same(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset
) -> None:
    roomy, narrow = (TeacherCache.open(cache_folder, key, open_shards=n) for n in (100, 1))
    sent = pickle.loads(pickle.dumps(narrow))
    for position in range(len(dataset)):
        for other in (narrow, sent):
            pairs = zip(*(read(c, [position], [1]) for c in (roomy, other)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    narrow.close()


def test_what_is_not_in_the_cache_is_an_error(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    cache = TeacherCache.open(cache_folder, key)
    for position, view in ((len(dataset), 0), (-1, 0), (0, 2)):
        with pytest.raises(IndexError, match=f"has no image {position} in view {view}; it holds 13 images in 2 view"):
            cache.read([position], [view])
    canvases = views.canvas_ids(np.zeros(len(dataset), int))
    with pytest.raises(ValueError, match="a batch must have one canvas"):
        cache.read([int(np.flatnonzero(canvases == c)[0]) for c in np.unique(canvases)[:2]], [0, 0])


def test_a_teacher_that_gives_something_else_is_an_error(
    tmp_path: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    writer = CacheWriter(tmp_path, key, dataset, views)
    good = tiny_taps(key, views)

    def wrong(change: Any) -> Any:
        return lambda positions, view: change(good(positions, view))

    for change, told in (
        (lambda t: Taps(None, t.pyramid), "tap 'c5' on canvas .* the teacher gave nothing"),
        (lambda t: Taps(t.c5, t.pyramid[:1]), "tap 'p4' on canvas .* the teacher gave nothing"),
        (lambda t: Taps(t.c5, (*t.pyramid, t.pyramid[1])), "the teacher gave 3 pyramid levels"),
        (lambda t: Taps(t.c5, (t.pyramid[0][..., 1:], t.pyramid[1])), "tap 'p3' on canvas .*: expected"),
    ):
        with pytest.raises(ValueError, match=told):
            writer.fill(writer.shards[0], wrong(change))
    boxed = max(writer.shards, key=lambda s: dataset.objects[list(s.positions)].max())
    with pytest.raises(CodecError, match=r"'c5'.* do not fit codec (fp16|sparse_channel)"):
        writer.fill(boxed, wrong(lambda t: Taps(t.c5 * 1e9, t.pyramid)))
    assert set(content(tmp_path)) == {"key.json"}, "a failed shard leaves nothing behind"


def test_samples_that_are_not_in_the_plans_order_are_refused(
    tmp_path: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    writer = CacheWriter(tmp_path, key, dataset, views)
    shard = max(writer.shards, key=lambda s: len(s.positions))
    samples = list(writer._samples(shard, tiny_taps(key, views)))
    assert len(samples) > 1
    with pytest.raises(ValueError, match="row 0: planned is"):
        writer.write(shard, samples[::-1])
    with pytest.raises(ValueError, match=f"the plan has {len(samples)} samples, got {len(samples) - 1}"):
        writer.write(shard, samples[:-1])
    with pytest.raises(ValueError, match="planned is no further sample"):
        writer.write(shard, [*samples, samples[0]])
