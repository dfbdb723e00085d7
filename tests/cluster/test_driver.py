"""Where a command connects to, and what its workers get beside what the job that it is in was submitted with."""

import os
import subprocess
import sys
from typing import Any

import pytest

from cluster import driver, ray_process

NOTHING: dict[str, Any] = {}


def test_a_command_starts_its_own_ray_and_never_joins_one_that_happens_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert driver.cluster_address() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")  # where `ray job submit` sends to
    assert driver.cluster_address() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    assert driver.cluster_address() == "192.0.2.1:6379"


def test_workers_find_the_code_and_set_themselves_up() -> None:
    own = driver._runtime_env(NOTHING)
    assert str(driver.ROOT) in own["env_vars"]["PYTHONPATH"].split(os.pathsep)
    assert own["worker_process_setup_hook"] is ray_process.set_up_worker


def test_what_every_process_of_ray_does_first_loads_nothing_heavy() -> None:
    """Ray starts half a dozen actors of its own per run: torch in each of them was most of what a short run cost."""
    code = "import sys, cluster.ray_process; print({'torch', 'pydantic', 'pyarrow', 'numpy'} & sys.modules.keys())"
    told = subprocess.run([sys.executable, "-c", code], cwd=driver.ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_what_a_job_was_submitted_with_wins() -> None:
    """Ray refuses a setting that comes from both."""
    job = {"working_dir": "gcs://x.zip", "env_vars": {"PYTHONPATH": "/mine", "A": "b"}}
    own = driver._runtime_env(job)
    assert not own["env_vars"].keys() & job["env_vars"].keys()
    assert own["env_vars"]["PYTHONWARNINGS"] == "ignore"
    assert "worker_process_setup_hook" not in driver._runtime_env({"worker_process_setup_hook": "mine"})


@pytest.mark.parametrize(("visible", "given"), [("", "cpu"), ("0", None)])
def test_a_worker_without_a_gpu_says_so_to_deepspeed(
    visible: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its own node: the driver's may be another kind of machine."""
    if ray_process.Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    # Set first, so that what the function sets is undone too.
    for name in ("DS_ACCELERATOR", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    ray_process.set_up_worker()
    assert os.environ.get("DS_ACCELERATOR") == given
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
