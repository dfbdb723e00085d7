"""What an earlier pack left in a folder, as far as it can be believed."""

import json
from pathlib import Path
from typing import Any

from data_sharding.files import STAMP, hash_of, unstamped

PLAN = "pack.json"


def read_plan(path: Path) -> dict[str, Any]:
    """What the pack in this folder was begun with. ValueError where that has changed."""
    content = path.read_bytes()
    try:
        old = STAMP not in (plan := dict(json.loads(content)))  # packs from before plans were stamped
        return plan if old else unstamped(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete this file's folder and pack anew") from error


def read_receipt(path: Path) -> dict[str, Any] | None:
    """What is known of a finished shard; None where nothing can be believed: it is made again, of the same bytes."""
    try:
        return unstamped(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def is_whole(path: Path, shard: dict[str, Any]) -> bool:
    """Whether a file is there with all the bytes that its receipt says."""
    return path.exists() and path.stat().st_size == shard["bytes"] and hash_of(path) == shard["xxh3_128"]
