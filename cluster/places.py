"""Where the paths of a recipe lead: workers have folders of their own, and a job's folder goes with the job.

The one rule: on a machine of one's own a relative path means the folder that the command was typed in; inside a job
(`ray job submit`) there is no such folder that outlives it, so every path must be absolute, on storage that all nodes
see.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig, check, to_tree
from cluster.grammar import ConfigError, overlay
from data_sharding.remote import is_url

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray's job manager sets it in the process that it starts for `ray job submit`, and `ray.init` reads it there."""
SQLITE = "sqlite:///"


def inside_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return JOB in os.environ


def job_environment() -> Mapping[str, Any]:
    """The runtime environment that the job was submitted with; empty outside of one."""
    return json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}


def anchored(config: RunConfig) -> RunConfig:
    """The recipe with absolute paths, so that drivers and workers on any node read the same files.

    Raises ConfigError for storage that is no folder, and inside a job for every relative path, in one message.
    """
    if inside_job():
        require_absolute(config)
    relative, relative_database = _relative(config)
    changes = {key: str(Path(path).resolve()) for key, path in relative.items()}
    if relative_database:
        changes["tracking.uri"] = SQLITE + str(Path(str(config.tracking.uri).removeprefix(SQLITE)).resolve())
    return check(overlay(to_tree(config), changes), source=config.name) if changes else config


def require_absolute(config: RunConfig) -> None:
    """Raise ConfigError for every path that would mean something else on another machine, in one message."""
    relative, relative_database = _relative(config)
    told = [f"{key}={path}" for key, path in relative.items()]
    told += [f"tracking.uri={config.tracking.uri}"] if relative_database else []
    if told:
        raise ConfigError(
            "inside a job every path must be absolute, on storage that all nodes see: the job's own folder holds the "
            f"code alone and is deleted with it. Relative here: {', '.join(told)}; set them, for example "
            "storage=/shared/minnow"
        )


def _relative(config: RunConfig) -> tuple[dict[str, str], bool]:
    """The relative paths by key, and whether the tracking database is one."""
    if is_url(config.storage):
        raise ConfigError(
            f"storage: must be a folder that all machines share, got {config.storage}; teacher caches alone may lie "
            "behind a URL: resources.caches=URL"
        )
    relative = {key: path for key, path in _paths(config, "") if not Path(path).is_absolute()}
    return relative, _relative_database(config.tracking.uri)


def _relative_database(uri: str | None) -> bool:
    return uri is not None and uri.startswith(SQLITE) and not uri.removeprefix(SQLITE).startswith("/")


def _paths(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted key and text of every setting that is a path: by its type, and texts named `weights`, `storage` or
    `caches` that are no URL."""
    if isinstance(node, Path):
        yield key, str(node)
    elif isinstance(node, str) and key.rpartition(".")[2] in ("weights", "storage", "caches") and not is_url(node):
        yield key, node
    for name, value in _members(node):
        yield from _paths(value, f"{key}.{name}" if key else name)


def _members(node: Any) -> list[tuple[str, Any]]:
    if is_dataclass(node):
        return [(field.name, getattr(node, field.name)) for field in fields(node)]
    if isinstance(node, Mapping):
        return [(str(name), value) for name, value in node.items()]
    if isinstance(node, tuple | list):
        return [(str(number), value) for number, value in enumerate(node)]
    return []
