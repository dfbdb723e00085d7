"""Where a run's teacher caches are: written below a folder, read there or behind a URL that they were copied to."""

from pathlib import Path

from cluster.config import RunConfig
from cluster.precompute.keys import cache_folder
from data_sharding.cache.key import CacheKey
from data_sharding.cache.opening import MANIFEST
from data_sharding.remote import Remote, is_url, place_of
from data_sharding.staging import Staging, default_folder


def cache_place(config: RunConfig, key: CacheKey) -> Path | str:
    """Where this key's cache is read, shared by all runs: a folder, or a URL."""
    caches = config.resources.caches
    folder = cache_folder(config, key)
    return folder if caches is None else place_of(caches, folder.name)


def is_finished(config: RunConfig, key: CacheKey) -> bool:
    """Whether this key's cache can be read there. Raises what `Remote` raises where nobody answers."""
    place = cache_place(config, key)
    return MANIFEST in Remote(str(place)).sizes() if is_url(place) else (Path(place) / MANIFEST).exists()


def staging_of(config: RunConfig) -> Staging | None:
    """This machine's copies of caches behind a URL; None where caches are read where they lie."""
    resources = config.resources
    if resources.caches is None or not is_url(resources.caches):
        return None
    return Staging(resources.staging or default_folder(), int(resources.staging_gb * 1e9))
