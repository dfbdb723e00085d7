"""What a checkpoint holds beside the engine's own files, and how a resumed run gets it all back.

Every rank writes its part into a local folder; Ray Train merges the parts into one checkpoint, which any number of
ranks can read. All files are read with `weights_only`: none can run code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.grammar import ConfigError
from data_sharding.world import World
from kd.assistants import AssistantTrainer
from kd.engine import Engine
from kd.optimise import Ema

FACTS = "minnow.json"
REST = "assistants_and_average.pt"


def save(
    folder: Path,
    *,
    step: int,
    engine: Engine,
    assistants: Mapping[str, AssistantTrainer],
    ema: Ema | None,
    world: World,
    facts: Mapping[str, Any],
) -> None:
    """Write this rank's part of the state after `step` optimizer steps into `folder`. All ranks call it."""
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(folder)
    torch.save(torch.get_rng_state(), folder / f"random_{world.rank:05d}.pt")
    if world.rank == 0:
        rest = {
            "assistants": {name: trainer.state_dict() for name, trainer in assistants.items()},
            "average": None if ema is None else ema.state_dict(),
        }
        torch.save(rest, folder / REST)
        (folder / FACTS).write_text(json.dumps({"step": step, "workers": world.size, **facts}))


def load(
    folder: Path,
    *,
    engine: Engine,
    assistants: Mapping[str, AssistantTrainer],
    ema: Ema | None,
    world: World,
    facts: Mapping[str, Any],
) -> tuple[int, int]:
    """Restore what `save` wrote, on as many workers or another number; the number of steps done, and the workers that
    did the last of them.

    Raises ConfigError where the checkpoint was written with other `facts`, such as another stage of ZeRO.
    """
    found = json.loads((folder / FACTS).read_text())
    asked = dict(facts)
    differing = [
        f"{name}: checkpoint {found.get(name)!r}, now {value!r}"
        for name, value in asked.items()
        if found.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"this run's checkpoint cannot be continued with other resources ({'; '.join(differing)}); set them back, "
            "or begin under a new name"
        )
    workers = int(found["workers"])
    engine.load(folder, workers)
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    if rest["assistants"].keys() != assistants.keys():
        raise ConfigError(
            f"the checkpoint holds the assistants {sorted(rest['assistants'])}, the recipe has {sorted(assistants)}"
        )
    for name, trainer in assistants.items():
        trainer.load_state_dict(rest["assistants"][name])
    if ema is not None:
        ema.load_state_dict(rest["average"])
    # Nothing in a step draws from the global generator; it is kept so that equal workers go on in an equal state.
    torch.set_rng_state(torch.load(folder / f"random_{world.rank % workers:05d}.pt", weights_only=True))
    return int(found["step"]), workers
