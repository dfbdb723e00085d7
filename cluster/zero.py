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
from typing import Any, Literal

import torch
from torch import Tensor

from data_sharding.world import World
from kd.distiller import Distiller
from kd.engine import Precision
from kd.optimise import OptimConfig, build_optimizer, clip_gradients, parameter_groups

Stage = Literal[0, 1, 2, 3]
TAG = "engine"


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


class ZeroEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 3.

    DeepSpeed averages gradients over ranks and micro-batches; our shares are to be summed, so each share is
    multiplied by the number of both.
    """

    def __init__(
        self, distiller: Distiller, config: OptimConfig, world: World, *, stage: Stage, precision: Precision = "fp32"
    ) -> None:
        import deepspeed

        self.distiller = distiller
        self.stage = stage
        self._scale = world.size * config.accumulate
        self._waiting = False
        self._clip_norm = config.clip_norm
        optimizer = build_optimizer(parameter_groups(distiller, config), config)
        self._engine: Any = deepspeed.initialize(
            model=distiller,
            optimizer=optimizer,  # pyright: ignore[reportArgumentType]
            config=_settings(config, world, stage, precision, sum(p.numel() for p in distiller.parameters())),
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
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def forget(self, part: str) -> None:
        optimizer = self._engine.optimizer
        base = getattr(optimizer, "optimizer", optimizer)
        for shard, group in self._shards():
            if group["name"].removesuffix("/bare") == part:
                base.state.pop(shard, None)

    def student_state(self) -> dict[str, Tensor]:
        import deepspeed

        student = self.distiller.student
        parameters = list(student.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            return {name: value.detach().clone() for name, value in student.state_dict().items()}

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"{folder}: no DeepSpeed checkpoint {TAG!r} in it; the checkpoint is not whole")

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


def _settings(config: OptimConfig, world: World, stage: Stage, precision: Precision, parameters: int) -> dict[str, Any]:
    # The default buckets hold half a billion numbers, allocated anew in every backward: 2 GB of page faults a step.
    # DeepSpeed wants a multiple of the number of ranks.
    bucket = -(-min(parameters, 200_000_000) // world.size) * world.size
    return {
        "train_micro_batch_size_per_gpu": config.batch // (world.size * config.accumulate),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": (config.clip_norm or 0.0) if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own bf16 casts parameters but not the running statistics of normalisers, and fp16 with clipping
        # silently stops training on a CPU: autocast with float32 weights is what works everywhere.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "wall_clock_breakdown": False,
    }
