"""One optimizer step: counts, teachers, forward and backward of every micro-batch, the check, the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sharding.batch import Batch, Taps
from data_sharding.world import World
from kd.assistants import AssistantTrainer, NonFiniteGradient
from kd.clock import Clock
from kd.distiller import Distiller, Moment
from kd.engine import Engine
from kd.optimise import OptimConfig, set_rates
from kd.teacher import Teacher


class NonFiniteLoss(FloatingPointError):
    """A loss term or a gradient became NaN or infinite: the weights are not worth keeping a checkpoint of."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, in plain numbers."""

    losses: dict[str, float]
    """Every term of the global batch's loss, by name."""
    rates: dict[str, float]
    """The learning rate of each part."""
    norm: float | None
    """The gradient's norm before clipping."""

    def metrics(self) -> dict[str, float]:
        """Flat numbers for the log; each distillation term also as its share of the task loss."""
        task = sum(value for name, value in self.losses.items() if name.startswith("task/"))
        shares = {
            f"share/{name.removeprefix('kd/')}": value / task
            for name, value in self.losses.items()
            if name.startswith("kd/") and task > 0
        }
        norm = {} if self.norm is None else {"train/gradient_norm": self.norm}
        return (
            {f"loss/{name}": value for name, value in self.losses.items()}
            | {"loss/total": sum(value for name, value in self.losses.items() if learnt(name))}
            | shares
            | self._scales()
            | {f"lr/{part}": rate for part, rate in self.rates.items()}
            | norm
        )

    def _scales(self) -> dict[str, float]:
        """What every calibrated method was multiplied by."""
        raw = {n.removeprefix("raw/"): value for n, value in self.losses.items() if n.startswith("raw/") and value}
        own = {
            lesson: [v for n, v in self.losses.items() if n.startswith(f"kd/{lesson}/") and not n.endswith("/head")]
            for lesson in raw
        }
        return {f"scale/{lesson}": sum(own[lesson]) / value for lesson, value in raw.items()}


def learnt(name: str) -> bool:
    """Whether a term of the distiller's is the student's to learn, not for the log alone."""
    return name.startswith(("task/", "kd/"))


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    teachers: Mapping[str, Teacher],
    assistants: Mapping[str, AssistantTrainer],
    config: OptimConfig,
    step: int,
    world: World,
    clock: Clock,
) -> StepReport:
    """Do optimizer step `step` (from 0) on this rank's micro-batches of one global batch."""
    distiller = engine.distiller
    progress = step / config.steps
    frozen = distiller.frozen(progress)
    if step > 0 and not frozen and distiller.frozen((step - 1) / config.steps):
        engine.forget("backbone")
    rates = set_rates(engine.groups, config, step, frozen)
    totals = global_totals(distiller, batches, world)
    batches = [batch.with_totals(totals) for batch in batches]
    taught = _teach(teachers, batches, clock)
    try:
        sums = _learn(engine, batches, taught, assistants, progress, clock)
    except NonFiniteGradient as error:
        raise _stopped(str(error), error.here, batches, step, world) from error
    losses = _checked(sums, batches, step, world)
    distiller.calibrate(losses)
    with clock.section("optimizer"):
        norm = engine.step()
    # DeepSpeed's way of telling it is -1.
    if norm is not None and not 0 <= norm < math.inf:
        raise NonFiniteLoss(
            f"step {step}: the gradient's norm is {norm} though every loss is finite; the run ends here, its last "
            "checkpoint is sound. Lower optim.lr, set optim.clip_norm, or start the method later"
        )
    return StepReport(losses=losses, rates=rates, norm=norm)


def global_totals(distiller: Distiller, batches: Sequence[Batch], world: World) -> dict[str, Tensor]:
    """What the losses divide by: counts summed over all micro-batches of all ranks, known before any forward."""
    per_batch = [
        {
            "images": torch.tensor(float(len(b)), device=b.images.device),
            "boxes": torch.tensor(float(sum(len(boxes) for boxes in b.boxes)), device=b.images.device),
        }
        | distiller.counts(b)
        for b in batches
    ]
    names = sorted(per_batch[0])
    local = torch.stack([torch.stack([counts[name].float() for name in names]) for counts in per_batch]).sum(0)
    return dict(zip(names, world.sum(local).unbind(), strict=True))


def _teach(teachers: Mapping[str, Teacher], batches: Sequence[Batch], clock: Clock) -> list[dict[str, Taps]]:
    with clock.section("teacher"), torch.no_grad():
        return [{name: teacher(batch) for name, teacher in teachers.items()} for batch in batches]


def _learn(
    engine: Engine,
    batches: Sequence[Batch],
    taught: Sequence[Mapping[str, Taps]],
    assistants: Mapping[str, AssistantTrainer],
    progress: float,
    clock: Clock,
) -> dict[str, Tensor]:
    """Forward and backward of every micro-batch; this rank's terms, summed over them.

    With accumulation, an assistant that advises after its step must see all micro-batches first: a rehearsal, one
    forward of the student more, without gradient. With one micro-batch it learns inside the student's own forward.
    """
    sums: dict[str, Tensor] = {}
    single = len(batches) == 1
    refreshing = any(trainer.assistant.refresh for trainer in assistants.values())
    for rehearsal in (True, False) if refreshing and not single else (False,):
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            moment = Moment(progress=progress, last=last, single=single, rehearsal=rehearsal, clock=clock)
            with clock.section("assistant" if rehearsal else "student"):
                losses = engine(batch, taught[number], assistants, moment)
                if not rehearsal:
                    engine.backward(torch.stack([value for name, value in losses.items() if learnt(name)]).sum())
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value, dtype=torch.float32)) + value.detach().float()
    return sums


def _checked(sums: dict[str, Tensor], batches: Sequence[Batch], step: int, world: World) -> dict[str, float]:
    """The terms summed over ranks; one wait for the device a step, before the optimizer can do harm."""
    names = sorted(sums)
    values = world.sum(torch.stack([sums[name] for name in names])).tolist()
    losses = dict(zip(names, values, strict=True))
    bad = [name for name, value in losses.items() if not torch.tensor(value).isfinite()]
    if bad:
        here = not torch.stack([sums[name] for name in bad]).isfinite().all()
        raise _stopped(", ".join(bad), bool(here), batches, step, world)
    return losses


def _stopped(what: str, here: bool, batches: Sequence[Batch], step: int, world: World) -> NonFiniteLoss:
    """The error that every rank raises, with the images of the ranks that are to blame (`here`)."""
    mine = [image for batch in batches for image in batch.image_ids] if here else []
    images = sorted({image for rank in world.gather(mine) if isinstance(rank, list) for image in rank})
    return NonFiniteLoss(
        f"step {step}: {what} is not finite on images {images}; the optimizer was not stepped. "
        "Look at these images' labels, lower optim.lr, set optim.clip_norm, or start the method later"
    )
