"""DeepSpeed behind the engine protocol: the student's optimizer state, gradients and parameters in shards.

DeepSpeed is imported inside functions that run on workers, never when this module is (its import probes for an
accelerator and can take down a controller that has none).
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.fragments import Fragment, Stage, Stored, fragments, save
from data_sharding.world import World
from kd.distiller import Distiller
from kd.engine import Precision
from kd.optimise import OptimConfig, build_optimizer, clip_gradients, parameter_groups

REST = "engine_rest.pt"
"""What the optimizer does not own: running statistics and frozen weights, as rank 0 has them."""


def start_deepspeed() -> None:
    """Make DeepSpeed use the process group that Ray Train made, quietly, and without compiling anything on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        # On a CPU init_distributed compiles a shared-memory all-reduce (20 s of g++) that only inference uses.
        deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def kept_collectives() -> object:
    """DeepSpeed's backend, which has looked up some of torch's collectives: see `cluster.ranks.traffic`."""
    import deepspeed.comm.comm

    return deepspeed.comm.comm.cdb


class ZeroEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 3.

    DeepSpeed averages gradients over ranks and micro-batches; our shares are to be summed, so each share is
    multiplied by the number of both.
    """

    def __init__(
        self,
        distiller: Distiller,
        config: OptimConfig,
        world: World,
        *,
        stage: Stage,
        precision: Precision = "fp32",
        offload: bool = False,
    ) -> None:
        """`offload`: the optimizer's share lives and steps in the host's memory; not at stage 0."""
        import deepspeed

        self.distiller = distiller
        self.stage: Stage = stage
        self._world = world
        self._scale = world.size * config.accumulate
        self._waiting = False
        self._clip_norm = config.clip_norm
        optimizer = build_optimizer(parameter_groups(distiller, config), config)
        self._engine: Any = deepspeed.initialize(
            model=distiller,
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            config=_settings(config, world, stage, precision, offload, sum(p.numel() for p in distiller.parameters())),
            dist_init_required=False,
        )[0]
        if stage == 0:
            self._reduce_the_student_apart()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self._engine.optimizer.param_groups

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        if self._waiting:  # DeepSpeed counts micro-batches by calls of its step
            self._engine.step()
        self._engine.backward(loss * self._scale)
        self._waiting = True

    def step(self) -> float | None:
        if self.stage == 0:  # whole gradients on every rank: clipped as the plain engine does, bit for bit
            norm = clip_gradients(self.groups, self._clip_norm)
            if not math.isfinite(norm):
                return norm
            self._engine.step()
            self._waiting = False
            return norm
        self._engine.step()
        self._waiting = False
        if self.stage == 3:
            # DeepSpeed writes over what has a gradient: a method that has stopped would count in every later norm.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def forget(self, part: str) -> None:
        for shard, group in self._shards():
            if group["name"].removesuffix("/bare") == part:
                self._base.state.pop(shard, None)

    def student_state(self) -> dict[str, Tensor]:
        student = self.distiller.student
        with self._gathered(list(student.parameters())):
            return {name: value.detach().clone() for name, value in student.state_dict().items()}

    def save(self, folder: Path) -> None:
        owned = self._owned()
        if self.stage == 0:  # every rank has everything: each writes some of it
            owned = owned[self._world.rank :: self._world.size]
        save(_part(folder, self._world.rank), owned, self._base.state)
        with self._gathered(self._frozen()):
            if self._world.rank == 0:
                torch.save({name: value.detach().cpu() for name, value in self._rest().items()}, folder / REST)

    def load(self, folder: Path, ranks: int | None = None) -> None:
        """Restore what the `ranks` of an earlier run saved (None: as many as there are now), at the same stage.

        Raises FileNotFoundError where one's part is missing, ValueError where it is another model's.
        """
        stored = Stored([_part(folder, rank) for rank in range(ranks or self._world.size)])
        trained = self._trained()
        stored.require({name: getattr(p, "ds_numel", p.numel()) for name, p in trained.items()})
        optimizer = self._engine.optimizer
        if self.stage == 3:
            optimizer.checkpoint_event_prologue()
        stored.fill(self._owned(), self._base.state)
        if self.stage in (1, 2):
            for name, parameter in trained.items():
                whole = stored.whole(name)
                assert whole is not None
                parameter.data.copy_(whole.view_as(parameter))
        if self.stage == 3:
            for own, stepped in zip(
                optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                own.data.copy_(stepped.data)
            optimizer.checkpoint_event_epilogue()
        self._load_rest(folder)

    @property
    def _base(self) -> torch.optim.Optimizer:
        """Torch's own optimizer inside DeepSpeed's."""
        optimizer = self._engine.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.distiller.named_parameters() if p.requires_grad}

    def _frozen(self) -> list[nn.Parameter]:
        return [p for p in self.distiller.parameters() if not p.requires_grad]

    def _owned(self) -> list[Fragment]:
        return fragments(self._engine.optimizer, self.stage, self._trained(), self._world.rank)

    def _rest(self) -> dict[str, Tensor]:
        trained = self._trained()
        return {name: value for name, value in self.distiller.state_dict().items() if name not in trained}

    def _load_rest(self, folder: Path) -> None:
        stored = torch.load(folder / REST, map_location="cpu", weights_only=True)
        with self._gathered(self._frozen(), changed=True):
            rest = self._rest()
            if rest.keys() != stored.keys():
                raise ValueError(f"{folder / REST} is another model's: {sorted(rest.keys() ^ stored.keys())[:5]}")
            for name, value in rest.items():
                value.copy_(stored[name])

    def _gathered(self, parameters: list[nn.Parameter], changed: bool = False) -> Any:
        """At stage 3 the whole of these inside; `changed` there, the same on every rank."""
        import deepspeed

        on = self.stage == 3 and len(parameters) > 0
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None, enabled=on)

    def _reduce_the_student_apart(self) -> None:
        """A ring of ranks sums a number in an order that depends on its place in the buffer. At stage 0 DeepSpeed
        packs the whole model, idle methods too, into one: end it after the student (its parameters come first), so
        that methods beside it do not change its bits. The other stages reduce what has a gradient."""
        reduce = self._engine._reduce_non_expert_gradients
        student = sum(p.numel() for p in self.distiller.student.parameters() if p.requires_grad)
        self._engine._reduce_non_expert_gradients = lambda gradients, _: reduce(gradients, student - 1)

    def _shards(self) -> list[tuple[Tensor, Mapping[str, Any]]]:
        """What the base optimizer's state is keyed by, with its group."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            groups = [
                optimizer.param_groups[optimizer.sub_group_to_group_id[i]] for i in optimizer.sub_group_to_group_id
            ]
            return list(zip(optimizer.fp32_partitioned_groups_flat, groups, strict=True))
        return [(p, group) for group in optimizer.param_groups for p in group["params"]]


def _part(folder: Path, rank: int) -> Path:
    return folder / f"engine_{rank:05d}.pt"


def _settings(
    config: OptimConfig, world: World, stage: Stage, precision: Precision, offload: bool, parameters: int
) -> dict[str, Any]:
    # The default buckets hold half a billion numbers, allocated anew in every backward: 2 GB of page faults a step.
    # DeepSpeed wants a multiple of the number of ranks and an even number.
    unit = 2 * world.size
    bucket = -(-min(parameters, 200_000_000) // unit) * unit
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # DeepSpeed only counts with it: where ranks cannot share evenly, theirs differ by one.
        "train_micro_batch_size_per_gpu": -(-config.batch // (world.size * config.accumulate)),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": (config.clip_norm or 0.0) if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own steps on a processor as well, and nothing is compiled
        # DeepSpeed's own bf16 casts parameters but not the running statistics of normalisers, and fp16 with clipping
        # silently stops training on a CPU: autocast with float32 weights is what works everywhere.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "wall_clock_breakdown": False,
    }
