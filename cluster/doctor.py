"""Look at everything before a run: machine, data, teachers, a dry step of every method, memory and disks; say what to
change. Packs and caches nothing."""

import sys
from typing import TYPE_CHECKING

from cluster.command import command

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.checkup.data import Labels
    from cluster.checkup.findings import Finding
    from cluster.config import RunConfig

SAMPLE = 48
"""Images per split on which teachers and losses are tried."""


def act(config: "RunConfig") -> int:
    """Print every area as it is done, then what to change; 1 where something would break the run."""
    import tempfile
    from pathlib import Path

    from cluster.checkup import data as checkup_data
    from cluster.checkup import machine as checkup_machine
    from cluster.checkup.findings import close, show

    machine = checkup_machine.examine(config)
    show(machine)
    findings = list(machine.findings)
    try:
        labels = checkup_data.read(config)
    except (ValueError, OSError) as error:
        return close([*findings, _broken("data", error)])
    area = checkup_data.examine(config, labels)
    show(area)
    findings += area.findings
    with tempfile.TemporaryDirectory(prefix="minnow_doctor_") as folder:
        findings += _run_through(config, labels, Path(folder))
    return close(findings)


def _broken(check: str, error: Exception) -> "Finding":
    from cluster.checkup.findings import Finding

    return Finding(check=check, found="cannot be used", verdict="FAIL", change=str(error) or type(error).__name__)


def _run_through(config: "RunConfig", labels: "Labels", folder: "Path") -> list["Finding"]:
    """What needs a student, and pixels: sizes, teachers, losses, memory, disks."""
    import torch

    from cluster import build
    from cluster.checkup import disks as checkup_disks
    from cluster.checkup import losses as checkup_losses
    from cluster.checkup import memory as checkup_memory
    from cluster.checkup import sizes as checkup_sizes
    from cluster.checkup import steps as checkup_steps
    from cluster.checkup import teachers as checkup_teachers
    from cluster.checkup.findings import Area, Finding, show
    from cluster.checkup.sample import pack_sample

    findings: list[Finding] = []

    def tell(area: Area) -> None:
        show(area)
        findings.extend(area.findings)

    try:
        student = build.build_student(config, len(labels.categories))
        sample = pack_sample(config, labels, folder, SAMPLE)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        return [_broken("student", error)]
    tell(checkup_sizes.examine(config, labels, student.shapes.strides))
    device = torch.device("cuda" if torch.cuda.is_available() and config.resources.gpu is not False else "cpu")
    teachers = checkup_teachers.examine(config, sample, labels.categories, device)
    if config.teachers:
        tell(teachers.area)
    # A lesson of a teacher that cannot be read is told above; the others are tried.
    known = teachers.loaded if config.taught else {}
    try:
        bench = checkup_steps.lay_bench(config, sample, known, device)
    except (ValueError, RuntimeError) as error:
        tell(checkup_disks.examine(config, labels, sample, None, []))
        return [*findings, _broken("batches", error)]
    losses, steps = checkup_losses.examine(bench)
    tell(losses)
    if steps:
        tell(checkup_memory.examine(config, bench, steps))
    tell(checkup_disks.examine(config, labels, sample, bench, steps))
    return findings


if __name__ == "__main__":
    sys.exit(command("doctor", __doc__ or "", act))
