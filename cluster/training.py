"""Train one run by its recipe, from packing to the closing result; the same call again continues it."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import config as recipes
from cluster import results
from cluster.config import RunConfig
from cluster.driver import follow, ray_started, require_resources, say, users_error, wants_gpu
from cluster.gate import require_good_teachers
from cluster.grammar import ConfigError
from cluster.packing import pack_splits
from cluster.places import anchored
from cluster.precompute.filling import fill_caches
from cluster.recovery import pulse, whole
from cluster.recovery.claim import alone
from cluster.recovery.delivery import deliver, delivered
from cluster.recovery.incidents import Teller, note
from cluster.terminal import progress
from cluster.tracking import RunHandle, TrackerAway, open_run, remembered
from cluster.worker import Job, work
from data_sharding.files import write_atomically

RECIPE = "recipe.yaml"
NEVER = 1e9
"""Seconds until Ray Train takes in nodes by itself, amid a step: `cluster.recovery.growth` does so at a checkpoint."""
START_TIMEOUT = "15"
"""Seconds that workers wait for as many places as there were before, where a run may go on with fewer."""
RESERVED = ("data", "caches", "gates", "mlflow_artifacts")


def train(config: RunConfig, further_tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Do what is left of the run; its result: metrics, minutes and where the student is. `further_tags` are set on its
    MLflow run."""
    config = anchored(config)
    folder = _claim(config)
    with alone(folder) as cut_off:
        return _train(config, folder, further_tags or {}, cut_off)


def _train(config: RunConfig, folder: Path, further_tags: Mapping[str, str], cut_off: str) -> dict[str, Any]:
    done = results.read(folder)
    if done is not None:
        say(f"{config.name} is finished already; its result is in {folder}")
        handle = remembered(config, config.storage)
        if handle is not None and not delivered(folder):
            deliver(folder, handle, say)
        return done
    if old := whole.unsealed(folder / results.TRAIN):
        raise ConfigError(
            f"{folder / results.TRAIN} holds checkpoints of an earlier version ({', '.join(old)}): without the hashes "
            "that are written now, nobody can tell whether they are whole. Finish the run with the version that began "
            "it, or choose a new name; nothing was changed"
        )
    packed = pack_splits(config)
    with ray_started():
        teachers = require_good_teachers(config)
        caches = fill_caches(config)
        require_resources(
            config.resources.least_workers,
            config.resources.threads,
            wants_gpu(config.resources.gpu, config.resources.least_workers),
        )
        tags = {"data.train": packed["train"].uid, "data.val": packed["val"].uid}
        tags |= {f"cache.{name}": cache.key.uid for name, cache in caches.items()}
        tags |= {f"teacher.{name}": cache.key.weights_sha256 for name, cache in caches.items()}
        tags |= {f"teacher.{name}.ap": f"{ap['own']:.2f}" for name, ap in teachers.items()}
        handle = _open(config, {**tags, **further_tags})
        began = time.perf_counter()
        try:
            result = _fit(config, folder, (handle.run_id, handle.uri), cut_off)
        except BaseException as error:
            # Ray turns SIGTERM, which `ray job stop` sends, into SystemExit; the job manager then waits for 3 s.
            handle.tell("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            told = _told(error)
            if told is not error:
                raise told from None
            raise
        minutes = (time.perf_counter() - began) / 60
        result |= {
            "minutes": minutes,
            "student": str(folder / results.STUDENT),
            "run_id": handle.run_id,
            "uri": handle.uri,
        }
        if results.RESTED not in result:
            write_atomically(folder / results.RESULT, (json.dumps(result, indent=2) + "\n").encode())
    whole.tidy(folder / results.TRAIN, config.resources.keep)
    pulse.forget(folder)
    deliver(folder, handle, say)
    return result


def _told(error: BaseException) -> BaseException:
    """An error in the user's words; the error itself where there are none for it."""
    from cluster.recovery.lost_workers import head_lost

    return head_lost(error) or users_error(error)


def _open(config: RunConfig, tags: Mapping[str, str]) -> RunHandle:
    """The run's record. One that was begun goes on without its server: its metrics wait in the run's folder."""
    try:
        return open_run(config, config.storage, tags)
    except TrackerAway as error:
        handle = remembered(config, config.storage)
        if handle is None:
            raise
        say(f"{config.name}: {error}. The run goes on; its metrics wait in its folder")
        return handle


def rows(config: RunConfig, result: dict[str, Any]) -> list[dict[str, object]]:
    """The closing table of a run."""
    if results.RESTED in result:
        return [{"run": config.name, "rests at step": result[results.RESTED], "checkpoint": result[results.CHECKPOINT]}]
    metrics = result["metrics"]
    shown = {name: metrics[name] for name in ("AP", "AP50", "AP_small") if name in metrics}
    return [{"run": config.name, **shown, "minutes": result["minutes"], "student": result["student"]}]


def _claim(config: RunConfig) -> Path:
    """The run's folder; refuses a name that another recipe has, telling what differs."""
    if config.name in RESERVED:
        raise ConfigError(f"name: {config.name!r} is a folder that runs share; choose another name")
    folder = Path(config.storage) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / RECIPE
    if kept.exists():
        changed = recipes.difference(anchored(recipes.load(kept, {})), config)
        if changed:
            lines = "\n  ".join(changed)
            raise ConfigError(
                f"run {config.name!r} in {folder} was begun with another recipe; set it back, or choose a new "
                f"name:\n  {lines}"
            )
    else:
        write_atomically(kept, recipes.to_recipe(config).encode())
    return folder


def _fit(config: RunConfig, folder: Path, run: tuple[str, str], cut_off: str) -> dict[str, Any]:
    """`cut_off`: who drove the run before and was killed."""
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    from cluster.recovery.lost_workers import NoteLostWorkers

    resources = config.resources
    # Ray's own check of its workers: only where none of them is left to notice (`cluster.recovery.pulse`).
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(1.5 * resources.hang_after + 30))
    if resources.least_workers < resources.most_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT)
    broken = whole.tidy(folder / results.TRAIN, resources.keep)
    gpu = wants_gpu(resources.gpu, resources.least_workers)
    trainer = TorchTrainer(
        work,
        train_loop_config=asdict(Job(tree=recipes.to_tree(config), folder=str(folder), run=run)),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": resources.threads} | ({"GPU": resources.gpu_share} if gpu else {}),
            elastic_resize_monitor_interval_s=NEVER,
        ),
        run_config=RayRunConfig(
            name=results.TRAIN,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=resources.keep),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[NoteLostWorkers(folder)],
        ),
    )
    teller = Teller(folder, config.name, say)
    _note_found(folder, cut_off, broken)
    with (
        progress(f"train {config.name}") as report,
        closing(teller),  # after the thread that looks has ended
        follow(folder / results.METRICS, report, config.optim.steps, look=teller.look),
    ):
        value: Any = trainer.fit().return_value
        while results.GROWS in value:
            value = trainer.fit().return_value
    if results.STOPPED in value:
        raise ConfigError(f"{config.name} stopped: {value[results.STOPPED]}")
    if results.RESTED in value:
        left, _ = whole.newest(folder / results.TRAIN)
        return {**value, results.CHECKPOINT: str(left)}
    return dict(value)


def _note_found(folder: Path, cut_off: str, broken: Sequence[str]) -> None:
    """What the command before left behind: that it was killed, and checkpoints that it did not finish."""
    if cut_off:
        note(folder, what=f"the command before ({cut_off}) was cut off")
    for told in broken:
        note(folder, what=f"a checkpoint is not whole and deleted ({told})")
