import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from data_sharding.cache.key import CacheKey, ForeignCache, TapLayout, library_versions
from data_sharding.cache.reader import TeacherCache
from data_sharding.cache.writer import CacheWriter
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.tiny import content

OTHER_VALUES: dict[str, Any] = {
    "mean": (0.5, 0.0, 0.0),
    "std": (2.0, 1.0, 1.0),
    "taps": ("c5", "p3", "p5"),
    "channels": (4, 3, 3),
    "strides": (16, 8, 16),
    "canvases": ((128, 128),),
    "codecs": ("sparse_channel", "sparse_position", "fp32"),
    "enlarged": 1.3,
    "versions": library_versions(),
}


@pytest.mark.parametrize("stored", ["int8 and sparse"], indirect=True)
@pytest.mark.parametrize("name", [f.name for f in fields(CacheKey)])
def test_a_foreign_cache_names_the_setting_and_both_values(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable, name: str
) -> None:
    mine = getattr(key, name)
    other = OTHER_VALUES.get(name, mine + 1 if isinstance(mine, int) else "other")
    asked = replace(key, **{name: other})
    assert asked.uid != key.uid
    with pytest.raises(ForeignCache, match=r"python -m cluster\.cache_teacher") as caught:
        TeacherCache.open(cache_folder, asked)
    assert list(caught.value.differing) == [name]
    plain = json.loads(json.dumps([mine, other]))
    assert f"{name}: cache has {plain[0]!r}, this run asks for {plain[1]!r}" in str(caught.value)


def test_a_writer_does_not_touch_the_folder_of_another_key(
    cache_folder: Path, key: CacheKey, dataset: PackedDataset, views: ViewTable
) -> None:
    before = content(cache_folder)
    with pytest.raises(ForeignCache, match="factor: cache has 1, this run asks for 2"):
        CacheWriter(cache_folder, replace(key, factor=2), dataset, views)
    assert content(cache_folder) == before


def test_impossible_keys_are_errors(key: CacheKey) -> None:
    with pytest.raises(ValueError, match="one channel count and one stride per tap"):
        replace(key, channels=(1,))
    with pytest.raises(ValueError, match="no codec 'fp8'"):
        replace(key, codecs=("fp16", "fp8", "fp16"), enlarged=None)
    with pytest.raises(ValueError, match="one codec per tap"):
        replace(key, codecs=("fp16",))
    for codecs, enlarged in ((("fp16", "fp16", "sparse_channel"), None), (("fp16",) * 3, 1.2)):
        with pytest.raises(ValueError, match="sparse codecs, and they alone, need `enlarged`"):
            replace(key, codecs=codecs, enlarged=enlarged)
    with pytest.raises(ValueError, match=f"got 0, {key.shard_bytes} and 1"):
        replace(key, batch=0)


def test_a_layout_knows_sizes_with_rounding_up() -> None:
    layout = TapLayout(names=("c5", "p3", "p7"), channels=(8, 4, 4), strides=(32, 8, 128))
    assert layout.sizes((800, 1344)) == ((25, 42), (100, 168), (7, 11))
