"""What all trials of a search share, made before the first one: packed splits, measured teachers, caches, places."""

import json
from itertools import product
from typing import Any

from cluster import build
from cluster.config import RunConfig, check, to_tree
from cluster.driver import require_resources, say, wants_gpu
from cluster.gate import require_good_teachers
from cluster.grammar import ConfigError, overlay
from cluster.packing import pack_splits
from cluster.places import anchored
from cluster.precompute.filling import fill_caches
from kd.plugins import plugin
from kd.teacher import all_reads
from tuning import objectives
from tuning.fitting import require_fitting
from tuning.plan import Plan

SHARED = ("data", "views", "teachers", "student")
"""Sections that decide what is packed and cached."""
MOST_CACHES = 64


def configs_of(plan: Plan) -> list[RunConfig]:
    """Runs that together need every packed split and cache that any trial needs; the first is the parent's."""
    draws = plan.space.grid() if plan.options.searcher == "grid" else plan.space.probes()
    keys = [key for key in plan.space.keys if key.name.partition(".")[0] in SHARED and "choice" in key.words]
    together = [
        dict(zip((k.name for k in keys), v, strict=True)) for v in product(*(k.distribution.grid() for k in keys))
    ]
    if len(together) > MOST_CACHES:
        raise ConfigError(f"{len(together)} combinations of data, views, teachers and students: each needs a cache")
    draws = draws + [plan.space.applying({**draws[0], **some}) for some in together if some]
    found: dict[str, RunConfig] = {}
    for draw in draws:
        config = anchored(check(plan.recipe_of(plan.name, 0, plan.space.changes(draw)), "draw"))
        tree = to_tree(config)
        methods = sorted((name, settings.reads_within) for name, settings in config.distill.items())
        found.setdefault(json.dumps([[tree[section] for section in SHARED], methods], sort_keys=True), config)
    return list(found.values())


def prepare(plan: Plan, configs: list[RunConfig]) -> None:
    """Pack, measure teachers and fill caches once, for all trials."""
    for config in {str(config.data): config for config in configs}.values():
        pack_splits(config)
        folder = build.split_folder(config, "val")
        if lines := objectives.lacking(config, plan.options.wanted, objectives.records(folder)):
            raise ConfigError("\n".join(lines))
    require_fitting(plan, lambda config: build.open_val(config).dataset.categories)
    stores = stores_of(configs)
    for config in configs:
        if config.taught:
            require_good_teachers(config)
            fill_caches(check(overlay(to_tree(config), stores), "caches"), students=plan.trials)


def stores_of(configs: list[RunConfig]) -> dict[str, Any]:
    """What the teachers' caches hold: all that any trial's methods read, so that one cache serves all trials."""
    methods = {method for config in configs for method in config.distill}
    reads = sorted(all_reads([plugin("kd.methods", method).Loss.reads for method in methods]))
    teachers = max(len(config.teachers) for config in configs)
    return {f"teachers.{number}.stores": reads for number in range(teachers)} if reads else {}


def places(plan: Plan, config: RunConfig) -> tuple[int, bool]:
    """Trials that fit the cluster side by side, and whether they take GPUs."""
    import ray

    resources = config.resources
    gpu = wants_gpu(resources.gpu, resources.least_workers)
    require_resources(resources.least_workers, resources.threads, gpu)
    total = ray.cluster_resources()
    fit = int(total["CPU"]) // (resources.least_workers * resources.threads)
    if gpu:
        fit = min(fit, int(total["GPU"] / (resources.least_workers * resources.gpu_share)))
    wanted = plan.options.at_once
    if wanted is not None and wanted > fit:
        say(f"search.at_once: {wanted} trials do not fit; {fit} run at a time")
    return max(1, min(fit, wanted or fit)), gpu
