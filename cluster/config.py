"""A recipe file becomes one frozen `RunConfig`; a `RunConfig` becomes flat parameters and comes back.

Every override, whether typed on the command line, drawn by Ray Tune or read back from MLflow, is a dotted key laid
over the recipe before it is checked, so there is one grammar and one set of error messages. Importing this file
imports every plug-in, and with them torch: a command first checks the recipe with the needed `cluster.part` of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cluster import mistakes
from cluster.grammar import ConfigError, find, flatten, overlay, parse, to_text, to_value, write
from cluster.sections import EvaluationConfig, OrderConfig, ResourcesConfig, TeacherConfig
from cluster.tracking import TrackingConfig
from data_sharding.views import ViewConfig, evaluation
from kd.methods.base import MethodConfig
from kd.optimise import OptimConfig
from kd.plugins import plugins

if TYPE_CHECKING:  # a type checker sees the common shape; at run time the folders decide
    from typing import Any as DatasetConfig
    from typing import Any as DetectorConfig

    MethodConfigs = dict[str, MethodConfig]
else:

    def _one_of(package: str) -> Any:
        members = tuple(module.Config for module in plugins(package).values())
        return Annotated[Union[members], Field(discriminator="name")] if len(members) > 1 else members[0]

    DatasetConfig, DetectorConfig = _one_of("data_sharding.datasets"), _one_of("kd.detectors")
    MethodConfigs = TypedDict(
        "MethodConfigs", {name: module.Config for name, module in plugins("kd.methods").items()}, total=False
    )

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a data set, a student, its teachers and methods, and the machines. Paths are as the recipe gave them."""

    name: str
    """The run's folder below `storage`: a second start under the same name continues the run."""
    data: DatasetConfig
    views: ViewConfig
    student: DetectorConfig
    teachers: tuple[TeacherConfig, ...] = ()
    distill: MethodConfigs = field(default_factory=dict)
    """Method name -> its settings; empty: plain training."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    storage: str = "runs"
    """Folder or URI, shared by all machines, for checkpoints, metrics and results."""
    seed: int = 0
    deterministic: bool = True
    """Only algorithms that give the same bits each time."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def taught(self) -> bool:
        """Whether any method learns from a teacher: only then teachers are read, gated and cached."""
        return any(settings.taught for settings in self.distill.values())

    @property
    def micro_batch(self) -> int:
        """Images per forward and worker, at most: where they cannot share evenly, some have one fewer."""
        return -(-self.optim.batch // (self.resources.least_workers * self.optim.accumulate))


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def load(recipe: str | Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Read a recipe (a path, or the name of a shipped one), lay the overrides over it and check the result."""
    path = find(recipe)
    return check(overlay(parse(path.read_text(), str(path)), overrides), source=str(path))


def check(tree: Mapping[str, Any], source: str) -> RunConfig:
    """Turn a nested dict into a RunConfig; report every mistake at once."""
    try:
        # JSON, not Python objects: strict and yet with lists for tuples and text for paths, as a recipe has them.
        config = _adapter().validate_json(json.dumps(tree, default=_plain), strict=True)
    except ValidationError as error:
        raise _told(source, mistakes.told(error, RunConfig, tree)) from None
    if found := mistakes.left_open(tree) or mistakes.contradictions(config) + _about_evaluation(config):
        raise _told(source, found)
    return config


def check_settings(kind: type[T], tree: Mapping[str, Any], source: str) -> T:
    """Turn a flat dict into settings that are no part of a recipe, by the same rules."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(tree, default=_plain), strict=True)
    except ValidationError as error:
        raise _told(source, mistakes.told(error, kind, tree)) from None


def _told(source: str, found: list[str]) -> ConfigError:
    error = ConfigError("\n  ".join([f"{source}: {len(found)} mistake(s)", *found]))
    error.mistakes = tuple(found)
    return error


def _about_evaluation(config: RunConfig) -> list[str]:
    try:
        evaluation_views(config)
    except ValueError as error:
        return [f"evaluation.{error}"]
    return []


def _plain(value: Any) -> Any:
    """What a program may lay over a recipe beside JSON's own types: paths and NumPy's numbers."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise ConfigError(f"a setting must be text, a number, true, false, null or a list of these, got {value!r}")


def to_tree(config: RunConfig) -> dict[str, Any]:
    """All settings, defaults too, as a nested dict of plain values: the inverse of `check`."""
    return _adapter().dump_python(config, mode="json")


def to_recipe(config: RunConfig) -> str:
    """The text of a recipe that says everything, for the run's folder."""
    return write(to_tree(config))


def to_params(config: RunConfig) -> dict[str, str]:
    """One text per setting, for `mlflow.log_params`."""
    return {key: to_text(value) for key, value in flatten(to_tree(config)).items()}


def from_params(params: Mapping[str, str]) -> RunConfig:
    """The inverse of `to_params`."""
    in_order = sorted(params, key=lambda key: [(int(p) if p.isdigit() else -1, p) for p in key.split(".")])
    return check(overlay({}, {key: to_value(params[key]) for key in in_order}), source="parameters")


def evaluation_views(config: RunConfig) -> ViewConfig:
    """How validation images are rendered at the student's resolution."""
    given = config.evaluation.views
    if given is None:
        return evaluation(config.views)
    sides = None if given.short_side is None else (given.short_side,)
    return evaluation(ViewConfig(short_side=sides, long_side=given.long_side, buckets=given.buckets))


def config_hash(config: RunConfig) -> str:
    """16 hex digits of every setting that may change what is learnt."""
    return hashlib.sha256(json.dumps(_lasting(config), sort_keys=True).encode()).hexdigest()[:16]


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every setting that may change what is learnt: such a run cannot continue under its name.

    Machines, storage, tracking, what a cache holds beside what is read and whether a live teacher is in shards may
    change between two starts of a run.
    """
    before, after = _lasting(old), _lasting(new)
    keys = [*before, *(key for key in after if key not in before)]
    changed = (key for key in keys if before.get(key) != after.get(key))
    return [f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}" for key in changed]


def _lasting(config: RunConfig) -> dict[str, str]:
    machines = ("name", "storage", "tracking.", "resources.")
    params = {
        k: v
        for k, v in to_params(config).items()
        if not (k.startswith("teachers.") and k.endswith((".stores", ".shard")))
    }
    return {k: v for k, v in params.items() if not k.startswith(machines) or k == "resources.precision"}
