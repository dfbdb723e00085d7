"""What every process of Ray does before anything else, workers and Ray's own actors alike. It loads nothing of the
project: beside each worker Ray starts several actors that need none of it, and torch alone is seconds in each."""

import os
from pathlib import Path


def set_up_worker() -> None:
    """Ray runs this in every worker process before anything else, on the node where the worker is."""
    if not _has_gpu():  # the driver's node may have none while the workers' nodes do
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        _use_host_interface()


def _use_host_interface() -> None:
    """Make gloo and NCCL talk over the interface that Ray knows this node by, not the one its host name resolves to."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


def _has_gpu() -> bool:
    """Whether this node has one; Ray sets CUDA_VISIBLE_DEVICES to nothing where a process may use none."""
    return Path("/dev/nvidiactl").exists() or bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
