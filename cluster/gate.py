"""Proof that a teacher is worth learning from, before a step is trained or a shard is written.

Its AP is measured on exactly the pixels and canvases that it will teach on; a random head, a wrong normalisation or
permuted classes cannot pass. The finding is kept beside the caches, by everything that it depends on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import build
from cluster.config import RunConfig, check, to_tree
from cluster.driver import require_resources, say, wants_gpu
from cluster.grammar import ConfigError
from cluster.pairs import require_fitting_pairs
from cluster.sections import TeacherConfig
from data_sharding.files import write_atomically


def require_good_teachers(config: RunConfig) -> dict[str, dict[str, float]]:
    """AP of every teacher at its own and at the student's resolution; ConfigError where one does not fit the student
    or misses its gate."""
    if config.distill:
        require_fitting_pairs(config, build.open_val(config).dataset.categories)
    found = {teacher.name: _measured(config, teacher) for teacher in config.teachers if config.taught}
    for teacher in config.teachers if config.taught else ():
        ap = found[teacher.name]
        say(
            f"teacher {teacher.name}: AP {ap['own']:.1f} at {teacher.factor}x, where it teaches (gate "
            f"{teacher.min_ap:g}); {ap['student']:.1f} at the student's resolution"
        )
        if ap["own"] < teacher.min_ap:
            raise ConfigError(
                f"teachers: {teacher.name!r} reaches AP {ap['own']:.1f} on the first {teacher.gate_images} validation "
                f"images at {teacher.factor}x, its gate is min_ap={teacher.min_ap:g}: a teacher that cannot find the "
                f"objects on these pixels teaches noise. Likely: {_on_worker(_suspect_teacher, config, teacher)}. Mend "
                "that, train it longer or at the resolution at which it teaches, or lower the gate knowingly"
            )
    return found


def _measured(config: RunConfig, teacher: TeacherConfig) -> dict[str, float]:
    val = build.open_val(config)
    loaded = build.load_teacher(teacher, val.dataset.categories)
    # The subset may be larger than the split; what then counts is the whole split.
    images = min(teacher.gate_images, len(val.dataset))
    facts = (loaded.sha256, val.dataset.uid, val.views.uid, teacher.factor, images, config.evaluation.max_dets)
    path = Path(config.storage) / "gates" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    found: dict[str, float] = _on_worker(_score_teacher, config, teacher)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found).encode())
    return found


def _on_worker(look: Callable[[Mapping[str, Any], str], Any], config: RunConfig, teacher: TeacherConfig) -> Any:
    """`look` at the teacher where there is a GPU if the run has one, and the teacher fits into one."""
    import ray

    gpu = wants_gpu(config.resources.gpu, 1) and not teacher.shard
    require_resources(1, config.resources.threads, gpu)
    task = ray.remote(look).options(num_cpus=config.resources.threads, num_gpus=int(gpu))
    return ray.get(task.remote(to_tree(config), teacher.name))


def _score_teacher(tree: Mapping[str, Any], name: str) -> dict[str, float]:
    """On a worker: the teacher's AP at both resolutions."""
    from cluster.scoring import score
    from data_sharding.world import World

    config, teacher, val, detector, device, truth = _prepared(tree, name)

    def ap(factor: int) -> float:
        count = len(truth.image_ids)
        found = score(detector, val, truth, config.evaluation, world=World(), device=device, factor=factor, first=count)
        return found.metrics["AP"]

    own = ap(teacher.factor)
    return {"own": own, "student": own if teacher.factor == 1 else ap(1)}


def _suspect_teacher(tree: Mapping[str, Any], name: str) -> str:
    """On a worker: what is likely wrong with a teacher that missed its gate."""
    from cluster.suspects import suspicion

    config, teacher, val, detector, device, truth = _prepared(tree, name)
    return suspicion(
        detector, val, truth, config.evaluation, device=device, factor=teacher.factor, needed=teacher.min_ap
    )


def _prepared(tree: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """The recipe, the teacher's section, the split, the detector on its device, and the labels of the gate's images."""
    import torch

    from cluster.scoring import ground_truth

    config = check(tree, source="the driver's recipe")
    config = replace(config, evaluation=replace(config.evaluation, slices=None))  # it teaches on whole canvases
    torch.set_num_threads(config.resources.threads)
    val = build.open_val(config)
    teacher = next(t for t in config.teachers if t.name == name)
    # Ray leaves a task its node's GPUs to see, whether or not it was given one.
    device = torch.device("cuda" if torch.cuda.is_available() and not teacher.shard else "cpu")
    detector = build.load_teacher(teacher, val.dataset.categories).detector.to(device)
    return config, teacher, val, detector, device, ground_truth(val, min(teacher.gate_images, len(val.dataset)))
