"""The doctor on the environment and the devices: versions against the lock file, processors, GPUs."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.checkup.findings import Area, Finding, size
from cluster.config import RunConfig
from cluster.driver import ROOT, cluster_address, ray_started

PYTHON = ((3, 11), (3, 13))
CORE = ("torch", "torchvision", "ray", "deepspeed", "mlflow", "pyarrow", "pydantic", "pyyaml", "safetensors", "xxhash")
CORE += ("numpy", "pillow", "pycocotools", "rich", "psutil", "matplotlib")
"""Without these no run starts."""
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


def examine(config: RunConfig) -> Area:
    """Python, packages, processors, memory and GPUs of this machine, or of the cluster that this process is in."""
    return Area(title="machine", findings=[_python(), _packages(ROOT / "requirements.lock"), *_devices(config)])


def memory() -> int:
    """Bytes of this machine's memory that processes may use."""
    limit = CGROUP_MEMORY.read_text().strip() if CGROUP_MEMORY.exists() else "max"
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        return Finding(check="Python", found=found)
    return Finding(check="Python", found=found, verdict="FAIL", change="use Python 3.11, 3.12 or 3.13 (`make setup`)")


def _packages(lock: Path) -> Finding:
    """Installed versions against the lock file."""
    if not lock.exists():
        return Finding(check="packages", found=f"no {lock.name} beside the code to compare with", verdict="note")
    wanted = dict(line.split("==") for line in lock.read_text().split() if "==" in line)
    found = {name: _version(name) for name in wanted}
    missing = [name for name in wanted if found[name] is None]
    differing = [name for name, want in wanted.items() if found[name] not in (None, want)]
    other = [f"{name} {found[name]} (locked {wanted[name]})" for name in differing]
    core = ", ".join(f"{name} {found[name]}" for name in ("torch", "ray", "deepspeed", "mlflow") if found.get(name))
    if broken := [name for name in missing if name in CORE]:
        told, verdict = f"not installed: {', '.join(broken)}", "FAIL"
    elif missing or other:
        told, verdict = "; ".join([*other, *(f"{name} is not installed" for name in missing)]), "warn"
    else:
        return Finding(check="packages", found=f"all {len(wanted)} as locked; {core}")
    return Finding(check="packages", found=told, verdict=verdict, change=f"{told}; install {lock.name} (`make setup`)")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(config: RunConfig) -> list[Finding]:
    if cluster_address() != "local":
        with ray_started():
            import ray

            total = ray.cluster_resources()
        return _enough(config, int(total.get("CPU", 0)), int(total.get("GPU", 0)), "the cluster")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings = _enough(config, cores(), gpus, "this machine")
    for number in range(gpus):
        facts: Any = torch.cuda.get_device_properties(number)
        findings.append(Finding(check=f"GPU {number}", found=f"{facts.name}, {size(facts.total_memory)}"))
    if not gpus and Path("/dev/nvidiactl").exists():
        findings.append(_unused_gpu())
    findings.append(Finding(check="memory", found=f"{size(memory())}, {size(psutil.virtual_memory().available)} free"))
    return findings


def _unused_gpu() -> Finding:
    return Finding(
        check="GPU",
        found=f"a driver is there, but torch {torch.__version__} cannot use it",
        verdict="warn",
        change="the GPU stays idle: bring driver and torch's CUDA version together (`nvidia-smi` tells the driver's)",
    )


def _enough(config: RunConfig, cpus: int, gpus: int, where: str) -> list[Finding]:
    """Whether the workers fit; Ray would wait for ever."""
    resources = config.resources
    asked = resources.least_workers * resources.threads
    told = f"{where} has {cpus}, {resources.least_workers} worker(s) x {resources.threads} thread(s) take {asked}"
    findings = [Finding(check="CPU cores", found=told)]
    if asked > cpus:
        fitting = max(1, cpus // resources.least_workers)
        fix = f"resources.threads={fitting}" if resources.least_workers <= cpus else f"resources.workers={cpus}"
        more = "" if resources.least_workers <= cpus else " resources.threads=1"
        findings = [Finding(check="CPU cores", found=told, verdict="FAIL", change=f"{told}: {fix}{more}")]
    if resources.gpu and gpus < resources.least_workers:
        told = f"{where} has {gpus}, resources.gpu=true asks for {resources.least_workers}"
        fix = f"resources.workers={gpus}" if gpus else "resources.gpu=null"
        findings.append(Finding(check="GPUs", found=told, verdict="FAIL", change=f"{told}: {fix}, or add nodes"))
    return findings
