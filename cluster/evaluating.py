"""Score a saved student on the validation split, on as many workers as the recipe has."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cluster import build
from cluster import config as recipes
from cluster.config import RunConfig
from cluster.driver import follow, ray_started, require_resources, say, users_error, wants_gpu
from cluster.grammar import ConfigError
from cluster.packing import pack_splits
from cluster.places import anchored
from cluster.results import DETECTIONS, STUDENT
from cluster.scoring import ground_truth, looks_per_image, score
from cluster.terminal import progress
from data_sharding.files import write_atomically
from data_sharding.world import World
from kd import student as student_files
from kd.evaluation.coco import to_coco_results
from kd.evaluation.speed import measure

METRICS = "evaluation.json"
PROGRESS = "evaluating.jsonl"


def evaluate(config: RunConfig) -> dict[str, float]:
    """AP and relatives in 0..100, parameters, and milliseconds per image; also written beside the student, with all
    detections as COCO results."""
    config = anchored(config)
    folder = Path(config.storage) / config.name
    if not (folder / STUDENT / student_files.FACTS).exists():
        raise ConfigError(f"{folder / STUDENT} holds no student; run `python -m cluster.train` with this recipe first")
    pack_splits(config)
    with ray_started():
        found = _on_workers(config, folder)
    say(f"written: {folder / DETECTIONS}, {folder / METRICS}")
    return found


def _on_workers(config: RunConfig, folder: Path) -> dict[str, float]:
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    resources = config.resources
    gpu = wants_gpu(resources.gpu, resources.least_workers)
    require_resources(resources.least_workers, resources.threads, gpu)
    trainer = TorchTrainer(
        work,
        train_loop_config={"tree": recipes.to_tree(config), "folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=resources.least_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": resources.threads} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RayRunConfig(
            storage_path=str(folder),
            name="evaluation",
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    seen, images = folder / PROGRESS, len(build.open_val(config).dataset)
    seen.unlink(missing_ok=True)
    try:
        with progress(f"evaluate {config.name}") as report, follow(seen, report, images):
            value: Any = trainer.fit().return_value
    except Exception as error:
        raise users_error(error) from None
    finally:
        seen.unlink(missing_ok=True)
    return dict(value)


def work(job: Mapping[str, Any]) -> dict[str, float]:
    """Ray Train's entry point: this rank's images; rank 0 writes and returns the numbers."""
    import ray.train
    from ray.train.torch import get_device

    config = recipes.check(job["tree"], source=job["folder"])
    torch.set_num_threads(config.resources.threads)
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size())
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    folder = Path(job["folder"])
    detector, info = student_files.load(folder / STUDENT)
    val = build.open_val(config)
    if info.categories != val.dataset.categories:
        raise ConfigError(
            f"{folder / STUDENT} knows other classes than the recipe's data set; evaluate it with its own"
        )
    detector = detector.to(device)
    found = score(
        detector,
        val,
        ground_truth(val),
        config.evaluation,
        world=world,
        device=device,
        threads=config.resources.threads,
        progress=_told_in(folder / PROGRESS) if world.rank == 0 else None,
    )
    if world.rank != 0:
        return {}
    speed = measure(detector, val.views.view(0, 0).canvas)
    looks = looks_per_image(val, config.evaluation.slices)
    numbers = found.metrics | {"parameters": float(speed.parameters), "ms_per_image": looks * speed.milliseconds}
    if config.evaluation.slices is not None:
        numbers["looks_per_image"] = looks
    results = to_coco_results(found.detections, info.categories)
    write_atomically(folder / DETECTIONS, json.dumps(results).encode())
    write_atomically(folder / METRICS, (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers


def _told_in(path: Path) -> Callable[[int, int], None]:
    """Rank 0 tells the driver how many images are done, in a file that the driver follows."""

    def tell(done: int, total: int) -> None:
        del total
        with path.open("a") as file:
            file.write(json.dumps({"s": done, "m": {}}) + "\n")

    return tell
