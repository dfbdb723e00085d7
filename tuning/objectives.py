"""Which numbers a search may look for: those that the evaluation tells, and that the validation set can give."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_sharding.record import Record
from data_sharding.shards import PackedDataset
from tuning.options import LITTLE
from tuning.trials import Objective

COCO_SIZES = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, 1e5)}


def mistakes(config: Any, wanted: Iterable[Objective], packed: Path) -> list[str]:
    """A line per objective that the recipe's evaluation does not tell, or its validation set cannot give, where that is
    `packed` already."""
    known = [*told(config), *LITTLE]
    lines: list[str] = []
    for objective in wanted:
        if objective.name not in known and not _of_protocol(objective.name, config):
            close = difflib.get_close_matches(objective.name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            lines.append(f"search.objectives: no number {objective.name!r}{hint} (known here: {', '.join(known)})")
    if (packed / "manifest.json").exists():
        lines += lacking(config, wanted, records(packed))
    return lines


def told(config: Any) -> list[str]:
    """What COCO's evaluation tells with these settings."""
    sizes = [*COCO_SIZES, *_fine(config)]
    return ["AP", "AP50", "AP75", *(f"AP_{s}" for s in sizes), *(f"AR_{s}" for s in sizes)] + [
        f"AR{cap}" for cap in config.evaluation.max_dets
    ]


def lacking(config: Any, wanted: Iterable[Objective], labelled: Iterable[Record]) -> list[str]:
    """A line per objective for whose size class no object is there to be found."""
    sizes = COCO_SIZES | _fine(config)
    asked = {o.name: sizes[o.name[3:]] for o in wanted if o.name[:3] in ("AP_", "AR_") and o.name[3:] in sizes}
    for record in labelled:
        counts = ~record.crowd & ~record.difficult
        areas = record.areas[counts]
        asked = {
            n: (low, high) for n, (low, high) in asked.items() if not ((areas >= low**2) & (areas <= high**2)).any()
        }
        if not asked:
            return []
    return [
        f"search.objectives: the validation set cannot give {name}: none of its objects has an area of "
        f"{low:g}^2 to {high:g}^2 pixels; take another objective"
        for name, (low, high) in asked.items()
    ]  # fmt: skip


def records(folder: Path) -> Iterator[Record]:
    """The labels of a packed split."""
    dataset = PackedDataset.open(folder)
    return (dataset.record(position) for position in range(len(dataset)))


def _fine(config: Any) -> dict[str, tuple[float, float]]:
    edges = config.evaluation.areas
    return {f"{low}_{high}": (float(low), float(high)) for low, high in zip((0, *edges), edges, strict=False)}


def _of_protocol(name: str, config: Any) -> bool:
    return any(name.startswith(f"{protocol}_") for protocol in config.evaluation.protocols)
