"""The cluster file is what `ray up` accepts, with each of its blocks; it keeps to loopback and asks for the token."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[2] / "ray_cluster.yaml"
BLOCK = re.compile(r"^# ==== ([\w-]+): .*$", re.MULTILINE)
PROVIDERS = {"on-premise": "local", "aws": "aws", "gcp": "gcp"}


def with_block(text: str, wanted: str) -> dict[str, Any]:
    """The file as it is read once the block `wanted` is commented in and the one that is in, out."""
    if wanted == "on-premise":
        return yaml.safe_load(text)
    head, *rest = BLOCK.split(text)
    blocks = dict(zip(rest[::2], rest[1::2], strict=True))
    assert blocks.keys() >= PROVIDERS.keys()
    lines = blocks[wanted].strip().splitlines()
    assert all(line.startswith("# ") for line in lines)
    switched = "\n".join(line.removeprefix("# ") for line in lines)
    return yaml.safe_load(f"{head}\n{switched}\n{rest[-1]}")


@pytest.fixture(params=PROVIDERS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = with_block(FILE.read_text(), request.param)
    assert found["provider"]["type"] == PROVIDERS[request.param]
    return found


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    for kind in prepared["available_node_types"].values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= prepared["max_workers"]
    # Ray's own defaults for a cloud install a Ray and packages of their own beside the environment of the lock file.
    commands = [*prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
    assert not [c for c in commands if "ray-wheels" in c or c.startswith("pip ")]


def test_what_is_not_a_setting_is_refused(cluster: dict[str, Any]) -> None:
    """Else the test above could not fail."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="setup_comands"):
        validate_config(prepare_config(cluster | {"setup_comands": []}))


def test_cloud_workers_are_spot_machines_within_limits_and_the_head_is_not() -> None:
    for name, spot in {"aws": "spot", "gcp": "SPOT"}.items():
        kinds = with_block(FILE.read_text(), name)["available_node_types"]
        assert spot in str(kinds["gpu"]["node_config"])
        assert spot not in str(kinds["head"]["node_config"])
        assert kinds["gpu"]["max_workers"] > 0


def test_every_ray_process_asks_for_the_token_and_the_dashboard_stays_on_loopback(cluster: dict[str, Any]) -> None:
    keys = ("head_start_ray_commands", "worker_start_ray_commands")
    starts = [command for key in keys for command in cluster[key] if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])


def test_an_environment_is_made_anew_for_another_lock_file_alone(tmp_path: Path) -> None:
    """The command of the file itself, with a Makefile that says when it is called. The lock file that differs is the
    older one: a copied file keeps its time, so that times say nothing."""

    command = next(c for c in yaml.safe_load(FILE.read_text())["setup_commands"] if "make setup" in c)
    folder = tmp_path / "minnow"
    folder.mkdir()
    (folder / "Makefile").write_text("setup:\n\tmkdir -p .venv/bin && cp /bin/true .venv/bin/ray && echo made >> log\n")

    def made(lock: str) -> int:
        (folder / "requirements.lock").write_text(lock)
        os.utime(folder / "requirements.lock", (0, 0))
        subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(tmp_path)}, check=True)
        return len((folder / "log").read_text().splitlines())

    assert made("a==1") == 1
    assert made("a==1") == 1
    assert made("a==2") == 2
    (folder / ".venv" / "bin" / "ray").unlink()
    assert made("a==2") == 3
