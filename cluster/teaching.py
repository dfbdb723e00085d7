"""The teachers of one rank of a run: live ones on its device, cached ones as what they left on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from cluster import build
from cluster.build import LoadedTeacher, Split
from cluster.config import RunConfig
from cluster.precompute.keys import cache_key
from cluster.precompute.places import cache_place, staging_of
from data_sharding.cache.reader import TeacherCache
from data_sharding.world import World
from kd.detectors.base import Shapes
from kd.teacher import CachedTeacher, Teacher, aligned_shapes


@dataclass(frozen=True, kw_only=True)
class Staff:
    """All teachers, by name."""

    loaded: Mapping[str, LoadedTeacher]
    teachers: Mapping[str, Teacher]
    """What each step asks. Sharded ones come with `shared_out`."""
    caches: Mapping[str, TeacherCache]
    """What the loader reads for the cached ones."""

    @property
    def live_factors(self) -> tuple[int, ...]:
        """The resolutions, beside the student's, at which the loader renders images for live teachers."""
        live = (teacher.config for teacher in self.loaded.values() if not teacher.config.cache)
        return tuple(sorted({config.factor for config in live} - {1}))


def open_teachers(config: RunConfig, student: Shapes, train: Split, device: torch.device) -> Staff:
    """Load the recipe's teachers, none where no method learns from one. Nobody else is waited for."""
    chosen = config.teachers if config.taught else ()
    loaded = {teacher.name: build.load_teacher(teacher, train.dataset.categories) for teacher in chosen}
    teachers: dict[str, Teacher] = {}
    caches: dict[str, TeacherCache] = {}
    for name, teacher in loaded.items():
        if teacher.config.cache:
            key = cache_key(config, teacher, student, train)
            caches[name] = TeacherCache.open(
                cache_place(config, key),
                key,
                verify=config.resources.checksums,
                staging=staging_of(config),
            )
            teachers[name] = CachedTeacher(name, aligned_shapes(teacher.detector.shapes, student))
        elif not teacher.config.shard:
            teacher.detector.to(device)
            teachers[name] = build.live_teacher(teacher, student, build.reads_of(config))
    return Staff(loaded=loaded, teachers=teachers, caches=caches)


def shared_out(staff: Staff, config: RunConfig, student: Shapes, world: World, device: torch.device) -> Staff:
    """With the teachers that are to be sharded, which never were whole on a device. All ranks call it together, before
    the student's engine is there; DeepSpeed is started."""
    from cluster.sharded_teacher import share_out

    most, reads = -(-config.optim.batch // (world.size * config.optim.accumulate)), build.reads_of(config)
    sharded = {
        name: build.live_teacher(teacher, student, reads, share_out(teacher.detector, device), most)
        for name, teacher in staff.loaded.items()
        if teacher.config.shard
    }
    return replace(staff, teachers={**staff.teachers, **sharded})
