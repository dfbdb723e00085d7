"""What every Ray Train worker does: build the run from its recipe, resume, step, evaluate, save, report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster import build, results
from cluster.config import RunConfig, check
from cluster.grammar import ConfigError
from cluster.metric_log import MetricLog
from cluster.ranks.memory import forget_peak, peak_bytes
from cluster.ranks.watching import Watch
from cluster.recovery import incidents
from cluster.recovery.growth import Nodes, Notice
from cluster.recovery.keeper import Keeper
from cluster.recovery.pulse import Pulse, begin
from cluster.repeatable import repeatable
from cluster.scoring import Score, ground_truth, score
from cluster.teaching import open_teachers, shared_out
from cluster.tracking import RunHandle
from data_sharding.batch import Batch
from data_sharding.loader import Loader
from data_sharding.world import World
from kd.clock import Clock
from kd.distiller import Distiller
from kd.engine import Engine
from kd.optimise import Ema
from kd.step import StepReport, train_step

T = TypeVar("T")
ROUNDING = 1e-3
"""The relative difference of a metric that another order of sums may make."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to its workers: plain values only."""

    tree: Mapping[str, Any]
    """The recipe."""
    folder: str
    """The run's folder, on storage that all machines share."""
    run: tuple[str, str] | None
    """MLflow run id and URI; None: the metrics stay in the run's folder."""


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """Ray Train's entry point on every worker; rank 0's return value is the run's result."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size())
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    # A recipe or a loss that cannot go on fails on every rank and would fail again: returned, not raised, so that Ray
    # does not restart the workers for it.
    try:
        worker = agreed(world, lambda: Worker(Job(**job), world, device))
        worker.start()
        return worker.run()
    except (ConfigError, FloatingPointError) as error:
        return {results.STOPPED: str(error)}


def agreed(world: World, act: Callable[[], T]) -> T:
    """The result of `act`, which must not wait for other ranks. Where it raised a ValueError on any rank, every rank
    raises that as a ConfigError: nobody waits for one that has left."""
    made, refused = None, ""
    try:
        made = act()
    except ValueError as error:
        refused = str(error) or repr(error)
    told = [text for text in world.gather(refused) if text]
    if told or made is None:
        raise ConfigError(str(told[0]))
    return made


class Worker:
    """One rank of a run."""

    engine: Engine
    watch: Watch
    """There after `start`."""
    pulse: Pulse
    """There while it runs."""

    def __init__(self, job: Job, world: World, device: torch.device) -> None:
        """Everything that a rank can do alone."""
        self.config = check(job.tree, source=job.folder)
        self.folder, self.world, self.device = Path(job.folder), world, device
        self.handle = RunHandle(*job.run) if job.run is not None and world.rank == 0 else None
        _set_up_torch(self.config)
        self.train, self.val = build.open_train(self.config), build.open_val(self.config)
        self.categories = self.train.dataset.categories
        self.student = build.build_student(self.config, len(self.categories)).to(device)
        self.replica = build.build_student(self.config, len(self.categories)).to(device).eval()
        self.staff = open_teachers(self.config, self.student.shapes, self.train, device)
        build.begin_as_taught(self.student, self.staff.loaded)
        taught = build.build_lessons(self.config, self.student.shapes, self.staff.loaded, world, device)
        self.assistants = taught.assistants
        self.distiller = Distiller(self.student, taught.lessons).to(device)
        self.ema = None if self.config.optim.ema is None else Ema(self.student, self.config.optim.ema)
        self.clock = Clock(device)
        self.truth = ground_truth(self.val)

    def start(self) -> None:
        """Build the engine, together with all other ranks."""
        from cluster.zero import ZeroEngine, kept_collectives, start_deepspeed

        start_deepspeed()
        optim, resources = self.config.optim, self.config.resources
        self.staff = shared_out(self.staff, self.config, self.student.shapes, self.world, self.device)
        self.engine = ZeroEngine(
            self.distiller,
            optim,
            self.world,
            stage=resources.zero,
            precision=resources.precision,
            offload=resources.offload,
        )
        every = self.config.tracking.ranks_every
        self.watch = Watch(self.world, self.device, every, self.folder, kept_collectives())

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint, or the beginning, to the end of the schedule."""
        with self._pulse() as self.pulse:
            keeper = self._keeper()
            done, workers = keeper.resume()
            forget_peak(self.device)
            with self._log(done, workers) as log, self.loader(done) as loader, self._machine_metrics():
                if not self._train(log, loader, keeper, done):
                    return {results.GROWS: True}
                if self._last < self.config.optim.steps:
                    return {results.RESTED: self._last}
                return self._finish(log, peak_bytes(self.device))

    def _train(self, log: MetricLog | None, loader: Loader, keeper: Keeper, done: int) -> bool:
        """All steps that are left; False where the workers shall start again to be more."""
        steps, last = self.config.optim.steps, self._last
        nodes = Nodes(self.config.resources, self.world, self.device.type == "cuda")
        notice = Notice(self.config.resources.notice_every)
        waited = loader.wait_seconds
        for step in range(done, last):
            self.pulse.at(step)
            began, began_cpu = time.perf_counter(), time.process_time()
            batches = [batch.to(self.device) for batch in next(loader)]
            with self.watch.counted():
                report = self.step(batches, step)
            if self.ema is not None:
                self.ema.update(self.student, step)
            data, waited = loader.wait_seconds - waited, loader.wait_seconds
            spent = {"step": time.perf_counter() - began, "cpu": time.process_time() - began_cpu, "data": data}
            self._log_step(log, step, report.metrics(), spent)
            every = self.config.evaluation.every
            if every and (step + 1) % every == 0 and step + 1 < steps:
                self._evaluate(log, step + 1)
            leaving = notice.look(step + 1)
            if leaving or (step + 1) % self.config.resources.checkpoint_every == 0 or step + 1 == last:
                keeper.save(step + 1, log)
                if leaving and self.world.rank == 0:
                    incidents.note(self.folder, now=f"{leaving}; saved at step {step + 1}")
                if step + 1 < last and nodes.room_for_more():
                    self._note_growth(step + 1)
                    return False
        return True

    @property
    def _last(self) -> int:
        """The step after which the run ends, or rests."""
        return min(self.config.optim.steps, self.config.resources.until or self.config.optim.steps)

    def _note_growth(self, step: int) -> None:
        if self.world.rank == 0:
            told = f"a node has joined; the {self.world.size} worker(s) stop at step {step} to be more"
            incidents.note(self.folder, what=told)

    def step(self, batches: Sequence[Batch], step: int) -> StepReport:
        """Do one optimizer step on this rank's micro-batches, together with all other ranks."""
        teachers, optim = self.staff.teachers, self.config.optim
        return train_step(self.engine, batches, teachers, self.assistants, optim, step, self.world, self.clock)

    def loader(self, done: int) -> Loader:
        """This rank's batches behind so many steps."""
        return Loader(
            self.train.dataset,
            self.train.views,
            build.build_order(self.config, self.train),
            world=self.world,
            accumulate=self.config.optim.accumulate,
            factors=self.staff.live_factors,
            caches=self.staff.caches,
            start_step=done,
            prefetch=self.config.resources.prefetch,
            threads=self.config.resources.threads,
            pin=self.device.type == "cuda",
            ahead=self.config.resources.staging_ahead,
        )

    @contextmanager
    def _pulse(self) -> Iterator[Pulse]:
        attempt = begin(self.folder, self.world)
        pulse = Pulse(
            self.folder, self.world, attempt, self.config.resources.hang_after, passed=lambda: self.clock.passed
        )
        try:
            yield pulse
        finally:
            pulse.close()

    @contextmanager
    def _log(self, done: int, workers: int) -> Iterator[MetricLog | None]:
        """Rank 0's. `workers`: as many wrote the checkpoint of step `done`."""
        if self.world.rank != 0:
            yield None
            return
        ship = self.handle.ship if self.handle else lambda rows: None
        log = MetricLog(
            self.folder / results.METRICS, ship, begin=done, tell=lambda text: incidents.note(self.folder, now=text)
        )
        if done or log.reached:
            incidents.note_resumed(
                self.folder, step=done, reached=log.reached, total=self.config.optim.steps, world=self.world
            )
        try:
            yield log
            # Ranks sum in another order when they are another number; a GPU may do so by itself.
            allowed = 0.0 if workers == self.world.size and self.config.deterministic else ROUNDING
            if log.difference is not None and not log.difference.relative <= allowed:
                incidents.note(self.folder, now=str(log.difference))
        finally:
            log.close()

    def _machine_metrics(self) -> Any:
        return nullcontext() if self.handle is None else self.handle.machine_metrics(f"rank{self.world.rank}")

    def _log_step(self, log: MetricLog | None, step: int, metrics: dict[str, float], spent: dict[str, float]) -> None:
        """`spent`: seconds of the whole step, of this process's processors, and of waiting for data."""
        times = self.clock.read() | spent | {"communication": self.watch.communication()}
        ranks = self.watch.see(step, times, self.config.optim.batch)
        if log is None:
            return
        split = {f"time/{name}_s": value for name, value in times.items()}
        log.log(step, metrics | split | ranks | {"time/images_per_s": self.config.optim.batch / spent["step"]})

    def _evaluate(self, log: MetricLog | None, step: int) -> Score:
        """Score the averaged weights where they are kept, else the student's, in a whole replica of its own."""
        self.replica.load_state_dict(self.engine.student_state() if self.ema is None else self.ema.state_dict())
        began = time.perf_counter()
        with self.pulse.doing("evaluating"):
            found = score(
                self.replica,
                self.val,
                self.truth,
                self.config.evaluation,
                world=self.world,
                device=self.device,
                threads=self.config.resources.threads,
                progress=self.pulse.moved,
            )
        if log is not None:
            log.log(step, {f"val/{n}": v for n, v in found.metrics.items()})
            log.log(step, {"time/evaluation_s": time.perf_counter() - began})
        return found

    def _keeper(self) -> Keeper:
        return Keeper(
            folder=self.folder,
            resources=self.config.resources,
            world=self.world,
            engine=self.engine,
            assistants=self.assistants,
            ema=self.ema,
            pulse=self.pulse,
        )

    def _finish(self, log: MetricLog | None, memory: int | None) -> dict[str, Any]:
        """Evaluate, save the student alone, and leave the result and pictures in the run's folder. `memory`: the most
        bytes that the steps held."""
        found = self._evaluate(log, self.config.optim.steps)
        if self.world.rank != 0:
            return {}
        try:
            left = results.leave(self.folder, self.config, self.replica, self.val, found, log, self.config.optim.steps)
        except OSError as error:
            # All other ranks are done: the last checkpoint is written, the same command does this again.
            raise ConfigError(
                f"the result cannot be written ({error}); make room and give the same command again"
            ) from error
        return left | {"device": self.device.type, "memory_bytes": memory}


def _set_up_torch(config: RunConfig) -> None:
    repeatable(config.deterministic)
    torch.set_num_threads(config.resources.threads)
    torch.manual_seed(config.seed)
