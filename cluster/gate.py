"""Proof that a teacher is worth learning from, before a step is trained or a shard is written.

Its AP is measured on exactly the pixels and canvases that it will teach on; a random head, a wrong normalisation or
permuted classes cannot pass. The finding is kept beside the caches, by everything that it depends on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import build
from cluster.config import RunConfig, check, to_tree
from cluster.driver import say, wants_gpu
from cluster.grammar import ConfigError
from cluster.sections import TeacherConfig
from data_sharding.files import write_atomically


def require_good_teachers(config: RunConfig) -> dict[str, dict[str, float]]:
    """AP of every teacher at its own and at the student's resolution; ConfigError where one misses its gate."""
    found = {teacher.name: _measured(config, teacher) for teacher in config.teachers if config.distill}
    for teacher in config.teachers if config.distill else ():
        ap = found[teacher.name]
        say(
            f"teacher {teacher.name}: AP {ap['own']:.1f} at {teacher.factor}x, where it teaches (gate "
            f"{teacher.min_ap:g}); {ap['student']:.1f} at the student's resolution"
        )
        if ap["own"] < teacher.min_ap:
            raise ConfigError(
                f"teachers: {teacher.name!r} reaches AP {ap['own']:.1f} on the first {teacher.gate_images} validation "
                f"images at {teacher.factor}x, its gate is min_ap={teacher.min_ap:g}: a teacher that cannot find the "
                "objects on these pixels teaches noise. Check its weights, its pixel statistics and its training "
                "resolution, train it longer, or lower the gate knowingly"
            )
    return found


def _measured(config: RunConfig, teacher: TeacherConfig) -> dict[str, float]:
    import ray

    val = build.open_val(config)
    loaded = build.load_teacher(teacher, val.dataset.categories)
    # The subset may be larger than the split; what then counts is the whole split.
    images = min(teacher.gate_images, len(val.dataset))
    facts = (loaded.sha256, val.dataset.uid, val.views.uid, teacher.factor, images)
    path = Path(config.storage) / "gates" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    task = ray.remote(_score_teacher).options(
        num_cpus=config.resources.threads, num_gpus=int(wants_gpu(config.resources.gpu, 1))
    )
    found: dict[str, float] = ray.get(task.remote(to_tree(config), teacher.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found).encode())
    return found


def _score_teacher(tree: Mapping[str, Any], name: str) -> dict[str, float]:
    """On a worker: the teacher's AP at both resolutions."""
    import torch

    from cluster.scoring import ground_truth, score
    from data_sharding.world import World

    config = check(tree, source="the driver's recipe")
    torch.set_num_threads(config.resources.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    val = build.open_val(config)
    teacher = next(t for t in config.teachers if t.name == name)
    detector = build.load_teacher(teacher, val.dataset.categories).detector.to(device)
    images = min(teacher.gate_images, len(val.dataset))
    truth = ground_truth(val, images)

    plain = replace(config.evaluation, slices=None)  # it teaches on whole canvases

    def ap(factor: int) -> float:
        found = score(detector, val, truth, plain, world=World(), device=device, factor=factor, first=images)
        return found.metrics["AP"]

    own = ap(teacher.factor)
    return {"own": own, "student": own if teacher.factor == 1 else ap(1)}
