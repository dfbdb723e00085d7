"""A small packed split, its views, and a finished teacher cache over them."""

import shutil
from pathlib import Path

import pytest

from data_sharding.cache.key import CacheKey
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.tiny import KEYS, tiny_dataset, tiny_key, tiny_views, write


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return tiny_dataset(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="session")
def views(dataset: PackedDataset) -> ViewTable:
    return tiny_views(dataset)


@pytest.fixture(scope="session", params=KEYS)
def stored(request: pytest.FixtureRequest) -> str:
    """Which of `KEYS` the cache has."""
    return request.param


@pytest.fixture(scope="session")
def key(stored: str, dataset: PackedDataset, views: ViewTable) -> CacheKey:
    return tiny_key(dataset, views, **KEYS[stored])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, key: CacheKey, dataset: PackedDataset, views: ViewTable) -> Path:
    return write(tmp_path_factory.mktemp("finished"), key, dataset, views).folder


@pytest.fixture
def cache_folder(tmp_path: Path, finished: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "taps")
