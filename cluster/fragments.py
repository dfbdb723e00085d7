"""The state of a ZeRO engine as pieces of named parameters, so that any number of workers can read it.

DeepSpeed's own checkpoints are read by as many ranks as wrote them, or converted between two runs by a program of
its own that knows Adam alone. Here every rank writes which stretch of which parameter it owns, with the optimizer's
memory of it: whoever reads puts the stretches together and takes those that it owns now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Stage = Literal[0, 1, 2, 3]
WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A stretch of one flattened parameter that this rank steps on."""

    name: str
    start: int
    """Its first number in the parameter."""
    length: int
    shard: Tensor
    """The flat tensor that it lies in: what the optimizer steps on, and what its memory is keyed by."""
    offset: int
    """Its first number in `shard`."""

    def of(self, x: Tensor) -> Tensor:
        """The stretch of a tensor that is laid out as `shard` is; a view."""
        return x.detach().view(-1)[self.offset : self.offset + self.length]


def fragments(
    optimizer: Any, stage: Literal[0, 1, 2, 3], named: Mapping[str, nn.Parameter], rank: int
) -> list[Fragment]:
    """What this rank owns of `named`, the parameters that DeepSpeed's `optimizer` trains."""
    find = {0: _whole, 1: _in_groups, 2: _in_groups, 3: _partitioned}[stage]
    return [f for f in find(optimizer, named, rank) if f.length > 0]


def _whole(optimizer: Any, named: Mapping[str, nn.Parameter], rank: int) -> Iterator[Fragment]:
    for name, parameter in named.items():
        yield Fragment(name=name, start=0, length=parameter.numel(), shard=parameter, offset=0)


def _in_groups(optimizer: Any, named: Mapping[str, nn.Parameter], rank: int) -> Iterator[Fragment]:
    """Stages 1 and 2: a group's parameters stand in one line, of which each rank steps on a part."""
    names = {id(parameter): name for name, parameter in named.items()}
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in parameters:
            mapped = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapped is not None:
                mine, its = mapped.lp_fragment_address, mapped.hp_fragment_address
                name = names[id(parameter)]
                yield Fragment(name=name, start=mine.start, length=mine.numel, shard=flat, offset=its.start)


def _partitioned(optimizer: Any, named: Mapping[str, nn.Parameter], rank: int) -> Iterator[Fragment]:
    """Stage 3: every parameter is cut into as many equal parts as there are ranks, the last one padded."""
    for name, parameter in named.items():
        group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
        whole: int = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
        length = min(part, whole - rank * part)
        shard = optimizer.fp32_partitioned_groups_flat[group]
        yield Fragment(name=name, start=rank * part, length=length, shard=shard, offset=offset)


def save(path: Path, owned: Sequence[Fragment], memory: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Write weights and the optimizer's `memory` of these fragments; readable without unpickling any code."""
    stored: dict[str, dict[str, Any]] = {}
    for fragment in owned:
        state = memory.get(fragment.shard, {})
        alike = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == fragment.shard.shape}
        values = {k: fragment.of(v).cpu().clone() for k, v in ({WEIGHT: fragment.shard} | alike).items()}
        counters = {k: v for k, v in state.items() if k not in alike and v is not None}
        stored[fragment.name] = {"start": fragment.start, "values": values, "counters": counters}
    torch.save(stored, path)


class Stored:
    """The fragments that all ranks of an earlier engine wrote."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises FileNotFoundError for a rank's file that is missing."""
        self._pieces: dict[str, list[Mapping[str, Any]]] = {}
        for path in paths:
            for name, piece in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                self._pieces.setdefault(name, []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece["start"])

    def require(self, named: Mapping[str, int]) -> None:
        """Raise ValueError unless every parameter in `named` (with its count of numbers) is there as a whole, and no
        other."""
        if named.keys() != self._pieces.keys():
            odd = sorted(named.keys() ^ self._pieces.keys())
            raise ValueError(f"the checkpoint's parameters are not this run's; only one of the two has {odd[:5]}")
        for name, count in named.items():
            reached = 0
            for piece in self._pieces[name]:
                reached += len(piece["values"][WEIGHT]) if piece["start"] == reached else 0
            if reached != count:
                raise ValueError(
                    f"the checkpoint holds {reached} of {count} numbers of {name}: a rank's part is missing"
                )

    def whole(self, name: str, key: str = WEIGHT) -> Tensor | None:
        """All numbers of a parameter, or of what the optimizer remembers of it under `key`; None where it is not."""
        found = [piece["values"].get(key) for piece in self._pieces[name]]
        return None if any(x is None for x in found) else torch.cat(found)

    def fill(self, owned: Sequence[Fragment], memory: dict[Tensor, dict[str, Any]]) -> None:
        """Set these fragments and the optimizer's `memory` of them. Shards that nothing is remembered of are forgotten:
        their next step is a first one."""
        for shard in {id(f.shard): f.shard for f in owned}.values():
            memory.pop(shard, None)
        for fragment in owned:
            pieces = self._pieces[fragment.name]
            stretch = slice(fragment.start, fragment.start + fragment.length)
            for key in pieces[0]["values"]:
                whole = self.whole(fragment.name, key)
                if whole is None:
                    continue
                target = fragment.shard
                if key != WEIGHT:
                    target = memory.setdefault(fragment.shard, {}).setdefault(key, torch.zeros_like(fragment.shard))
                fragment.of(target).copy_(whole[stretch])
            if pieces[0]["counters"]:
                memory.setdefault(fragment.shard, {}).update(_copied(pieces[0]["counters"]))


def _copied(counters: Mapping[str, Any]) -> dict[str, Any]:
    """Every shard counts for itself."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in counters.items()}
