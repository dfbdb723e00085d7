"""A trained detector as two files, `student.safetensors` and `student.json`, that detector code alone can load.

Needs neither the recipe nor the cluster: this is what leaves the house.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.record import Category
from kd.detectors.base import Detector
from kd.plugins import plugin

STUDENT_VERSION = 1
WEIGHTS, FACTS = "student.safetensors", "student.json"


@dataclass(frozen=True, kw_only=True)
class StudentInfo:
    """What `student.json` says of the weights beside it."""

    config: Any
    """The detector's Config."""
    categories: tuple[Category, ...]
    """The class of label i is the i-th."""
    input: dict[str, Any]
    """How images are brought to the detector (canvas, short side, ...), as the caller gave it to `save`."""
    metrics: dict[str, float]
    sha256: str
    """Of the weight file."""


def save(
    detector: Detector,
    config: Any,
    categories: Sequence[Category],
    folder: Path | str,
    *,
    input: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write both files into `folder`; returns it.

    `detector` must hold its whole weights (no ZeRO shards) and have been built from `config`. Each file appears
    whole or not at all; when the process dies between the two, `load` refuses the pair by its checksum.
    """
    from safetensors.torch import save as to_bytes

    if detector.shapes.num_classes != len(categories):
        raise ValueError(
            f"the detector knows {detector.shapes.num_classes} classes, {len(categories)} categories given"
        )
    state = {name: value.detach().cpu().contiguous() for name, value in sorted(detector.state_dict().items())}
    empty = [name for name, value in state.items() if value.numel() == 0]
    if empty:
        raise ValueError(f"no values in {', '.join(empty[:5])}: gather the ZeRO shards into a whole replica first")
    weights = to_bytes(state)
    facts = {
        "version": STUDENT_VERSION,
        "detector": asdict(config),
        "categories": [{"id": c.id, "name": c.name} for c in categories],
        "input": dict(input or {}),
        "metrics": dict(metrics or {}),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights)
    _write(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    return folder


def load(folder: Path | str) -> tuple[Detector, StudentInfo]:
    """The detector in eval mode on the CPU, and its facts. Strict in version, settings, names and checksum."""
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
    facts = json.loads((folder / FACTS).read_text())
    if facts["version"] != STUDENT_VERSION:
        raise ValueError(f"{folder / FACTS} has version {facts['version']}, this code reads {STUDENT_VERSION}")
    weights = (folder / WEIGHTS).read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != facts["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} has sha256 {found[:12]}, {FACTS} asks for {facts['sha256'][:12]}: the two files "
            "are not of one export; save the student again"
        )
    module = plugin("kd.detectors", facts["detector"]["name"])
    config = _settings(module.Config, facts["detector"])
    detector = module.build(config, len(facts["categories"]), weights_follow=True)
    detector.load_state_dict(from_bytes(weights))
    info = StudentInfo(
        config=config,
        categories=tuple(Category(id=c["id"], name=c["name"]) for c in facts["categories"]),
        input=facts["input"],
        metrics=facts["metrics"],
        sha256=found,
    )
    return detector.eval(), info


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and values of all parameters and buffers (pixel statistics too), whatever the
    device and memory layout: a teacher's identity."""
    digest = hashlib.sha256()
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda entry: entry[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _settings(cls: type, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass from its `asdict` after a round through JSON.

    A setting that came after the file was written takes its default: by the house's rule new settings begin as what
    the code did before them. (The weights are loaded strictly, whatever the settings say.)
    """
    assert is_dataclass(cls)
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = needed - values.keys(), values.keys() - {f.name for f in fields(cls)}
    if missing or unknown:
        raise ValueError(
            f"settings of {cls.__module__} in {FACTS} do not fit this code: missing {sorted(missing)}, unknown "
            f"{sorted(unknown)}; read it with the version of this code that wrote it"
        )
    return cls(**{name: _setting(name, value) for name, value in values.items()})


def _setting(name: str, value: Any) -> Any:
    if name == "backbone":
        return _settings(plugin("kd.backbones", value["name"]).Config, value)
    if isinstance(value, list):
        return tuple(_setting(name, item) for item in value)
    return value


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
