"""Where a run's caches are read and written follows from one setting."""

from pathlib import Path

import pytest

from cluster.config import RunConfig, config_hash, load
from cluster.grammar import ConfigError
from cluster.places import JOB, anchored
from cluster.precompute.places import cache_place, is_finished, staging_of
from data_sharding.cache.key import CacheKey
from data_sharding.publish import publish
from data_sharding.remote import Remote
from tests.data_sharding.tiny import tiny_dataset, tiny_key, tiny_views, write


def recipe(**settings: object) -> RunConfig:
    return load("digits_scalekd", {"teachers.0.weights": "/shared/student", "storage": "/shared/runs", **settings})


@pytest.fixture
def key(tmp_path: Path) -> CacheKey:
    dataset = tiny_dataset(tmp_path / "packed", count=2)
    return tiny_key(dataset, tiny_views(dataset))


def test_caches_are_below_the_storage_or_where_the_recipe_says(key: CacheKey, tmp_path: Path) -> None:
    name = f"arithmetic-{key.uid[:12]}"
    assert cache_place(recipe(), key) == Path("/shared/runs/caches") / name
    assert cache_place(recipe(**{"resources.caches": "/fast"}), key) == Path("/fast") / name
    far = recipe(**{"resources.caches": "s3://bucket/caches", "resources.staging": str(tmp_path / "s")})
    assert cache_place(far, key) == f"s3://bucket/caches/{name}"
    assert staging_of(recipe()) is None
    assert staging_of(recipe(**{"resources.caches": "/fast"})) is None
    staging = staging_of(far)
    assert staging is not None
    assert (staging.folder, staging.limit) == (tmp_path / "s", 50 * 10**9)


def test_a_cache_is_finished_once_its_manifest_is_there(key: CacheKey, tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path / "packed", count=2)
    near = recipe(**{"resources.caches": str(tmp_path / "near")})
    far = recipe(**{"resources.caches": "memory://finished"})
    assert not is_finished(near, key)
    write(Path(cache_place(near, key)), key, dataset, tiny_views(dataset))
    assert is_finished(near, key)
    assert not is_finished(far, key)
    publish(Path(cache_place(near, key)), Remote(str(cache_place(far, key))))
    assert is_finished(far, key)


def test_where_caches_lie_does_not_change_what_is_learnt_and_a_url_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    far = recipe(**{"resources.caches": "s3://bucket/caches", "resources.staging_gb": 2})
    assert config_hash(far) == config_hash(recipe())
    assert anchored(far) is far
    assert anchored(recipe(**{"resources.caches": "near"})).resources.caches == str(tmp_path / "near")
    monkeypatch.setenv(JOB, "{}")
    assert anchored(far) is far
    with pytest.raises(ConfigError, match=r"Relative here: resources\.caches=near"):
        anchored(recipe(**{"resources.caches": "near"}))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"resources.caches": "s3://key:secret@bucket/caches"}, "holds a secret"),
        ({"resources.staging_gb": 0}, "staging_gb must be > 0"),
        ({"resources.staging_ahead": -1}, "staging_ahead >= 0"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(setting: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        recipe(**setting)
    assert "key:secret" not in str(error.value)
