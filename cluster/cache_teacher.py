"""Store what the teacher sees: its taps for every view, in Arrow shards, with size and break-even told first."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from cluster.config import RunConfig


DRY_RUN = "fill nothing: size, time and break-even of every codec, each measured for a second"


def act(config: "RunConfig", dry_run: bool = False) -> None:
    """Check the teachers, fill their caches and print what was written; `dry_run`: what would be."""
    from cluster.driver import ray_started
    from cluster.gate import require_good_teachers
    from cluster.grammar import ConfigError
    from cluster.packing import pack_splits
    from cluster.precompute.filling import fill_caches
    from cluster.terminal import table

    if not any(teacher.cache for teacher in config.teachers) or not config.taught:
        raise ConfigError("nothing to cache: the recipe has no method, or no teacher with cache=true")
    pack_splits(config)
    if dry_run:
        _foretell(config)
        return
    with ray_started():
        require_good_teachers(config)
        filled = fill_caches(config)
    rows = [
        {
            "teacher": name,
            "taps": ", ".join(cache.key.taps),
            "codec": ", ".join(cache.key.codecs),
            "MB": cache.bytes / 1e6,
            "seconds": cache.seconds,
            "place": str(cache.place),
        }
        for name, cache in filled.items()
    ]
    table("teacher caches", rows)


def _foretell(config: "RunConfig") -> None:
    from cluster.driver import ray_started
    from cluster.precompute.dry_run import forecast, rows, told
    from cluster.terminal import table

    with ray_started():
        found = [forecast(config, teacher.name) for teacher in config.teachers if teacher.cache]
    for one in found:
        table(f"cache of teacher {one.teacher}: {one.samples} samples, {one.writers} writer(s)", rows(one))
        sys.stdout.write(f"{told(one)}\n")


if __name__ == "__main__":
    sys.exit(command("cache_teacher", __doc__ or "", act, switches={"dry_run": DRY_RUN}))
