"""`ray up ray_cluster.yaml` by ssh, a recipe sent from outside, two nodes that train together, `ray down`; and who has
no token, or the wrong one, gets nowhere."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_netns.hosts import ROOT, SHARED, wait_for
from tests.cluster_netns.net_cluster import (
    ADDRESS,
    FILE,
    PLAIN,
    TOKEN,
    WORKERS,
    Cluster,
    listening,
    started_cluster,
    why_not,
)
from tests.end_to_end.commands import SMALL_DATA, SMALL_STUDENT, save_teacher

pytestmark = pytest.mark.hosts

STEPS = 6
DASHBOARD, GCS = 8265, 6379
KEPT_LOG = ROOT / "runs" / "ray_up.txt"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no cluster of hosts here: {reason}")
    with started_cluster(tmp_path_factory.mktemp("cluster") / "hosts") as started:
        yield started


def settings(cluster: Cluster, name: str) -> list[str]:
    return [
        "digits_scalekd",
        *SMALL_DATA,
        *SMALL_STUDENT,
        f"name={name}",
        f"storage={SHARED}/minnow",
        f"teachers.0.weights={SHARED}/weights",
        "teachers.0.min_ap=0",
        "teachers.0.gate_images=4",
        "distill.scalekd.start=0.2",
        'distill.scalekd.sdf={"width":16,"token_width":16}',
        'distill.scalekd.csa={"heads":2}',
        f"optim.steps={STEPS}",
        "resources.workers=2",
        "resources.zero=2",
        "resources.checkpoint_every=3",
        f"tracking.uri={cluster.record.uri}",
    ]


@pytest.fixture(scope="module")
def run(cluster: Cluster) -> Path:
    """A recipe sent from the laptop and followed to its end; its folder."""
    storage = cluster.laptop.place.parent / "shared"
    save_teacher(storage / "weights")
    words = ["python", "-m", "cluster.submit", *settings(cluster, "together"), "--address", ADDRESS]
    assert cluster.type(words, "submit") == 0, cluster.said("submit")
    return storage / "minnow" / "together"


def test_ray_up_by_ssh(cluster: Cluster) -> None:
    told = cluster.said("up")
    assert "New status: up-to-date" in told
    assert all(f"({n}/3)" in told for n in range(3)), "setup commands"
    assert cluster.secrets["token"] not in told
    KEPT_LOG.parent.mkdir(exist_ok=True)
    KEPT_LOG.write_text(re.sub(r"\n{2,}", "\n", told + cluster.said("status")))


def test_the_dashboard_is_on_the_heads_loopback_and_behind_the_tunnel_alone(cluster: Cluster) -> None:
    places = [address for address, port in listening(cluster.hosts["head"]) if port == DASHBOARD]
    assert places == ["127.0.0.1"]
    head = cluster.hosts["head"].address
    assert cluster.type(["bash", "-c", f"</dev/tcp/{head}/{GCS}"], "reach") == 0
    assert cluster.type(["bash", "-c", f"</dev/tcp/{head}/{DASHBOARD}"], "reach") != 0
    assert cluster.type(["bash", "-c", f"</dev/tcp/127.0.0.1/{DASHBOARD}"], "reach") == 0


WHO = {"none": {"HOME": "/tmp"}, "wrong": {"RAY_AUTH_TOKEN": "0" * 64}}


@pytest.mark.parametrize("who", WHO)
def test_without_the_token_or_with_a_wrong_one_nothing_is_taken(cluster: Cluster, who: str) -> None:
    log = f"stranger_{who}"
    send = ["python", "-m", "cluster.submit", *settings(cluster, log), "--address", ADDRESS]
    assert cluster.type(send, log, WHO[who]) == 2
    assert "asks for a token" in cluster.said(log)
    submit = ["ray", "job", "submit", "--address", ADDRESS, "--", "true"]
    assert cluster.type(submit, f"{log}_ray", WHO[who] | TOKEN) != 0
    join = ["ray", "start", f"--address={cluster.hosts['head'].address}:{GCS}", "--num-cpus=1"]
    assert cluster.type(join, f"{log}_join", WHO[who] | TOKEN) != 0
    assert cluster.laptop.processes("raylet") == []


def test_two_nodes_trained_and_all_of_them_evaluated(cluster: Cluster, run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["s"] for row in rows if "loss/total" in row["m"]] == list(range(STEPS))
    facts = json.loads(next((run / "train").glob("checkpoint_*/minnow.json")).read_text())
    assert facts == {"step": facts["step"], "workers": 2, "zero": 2}
    trained = [name for name in WORKERS if _trained_on(cluster, name)]
    assert trained == list(WORKERS)
    # The student alone, evaluated by one process: sharding the images changed nothing.
    words = ["python", "-m", "cluster.evaluate", *settings(cluster, "together"), "resources.workers=1"]
    assert cluster.type([*words, "tracking.uri=null"], "evaluate") == 0, cluster.said("evaluate")
    result = json.loads((run / "result.json").read_text())
    assert f"{result['metrics']['AP']:.2f}" in cluster.said("evaluate")


def _trained_on(cluster: Cluster, name: str) -> bool:
    """Ray names the worker of a run in its log on the node where it ran."""
    logs = (cluster.hosts[name].place / "tmp" / "ray").glob("session_2*/logs/worker-*")
    return any("RayTrainWorker" in path.read_text(errors="replace") for path in logs)


def test_the_record_is_whole_and_closed_to_strangers(cluster: Cluster, run: Path) -> None:
    remembered = json.loads((run / "mlflow_run.json").read_text())
    assert remembered["uri"] == cluster.record.uri
    code = (
        "import json, sys; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1]); r = c.get_run(sys.argv[2]); "
        "print(json.dumps([r.info.status, [m.step for m in c.get_metric_history(sys.argv[2], 'loss/total')]]))"
    )
    words = ["python", "-W", "ignore", "-c", code, cluster.record.uri, remembered["run_id"]]
    known = {"MLFLOW_TRACKING_USERNAME": cluster.record.user, "MLFLOW_TRACKING_PASSWORD": cluster.record.password}
    assert cluster.type(words, "known", known) == 0, cluster.said("known")
    assert json.loads(cluster.said("known").splitlines()[-1]) == ["FINISHED", list(range(STEPS))]
    assert cluster.type(words, "unknown") != 0
    assert "401" in cluster.said("unknown")


def test_no_secret_is_written_anywhere(cluster: Cluster, run: Path) -> None:
    places: list[Path] = [run.parent, cluster.logs]
    places += [host.place / "tmp" for name, host in cluster.hosts.items() if name != "record"]
    found = {what: _holding(places, secret) for what, secret in cluster.secrets.items()}
    assert found == {what: [] for what in cluster.secrets}
    dump = cluster.record.dump()
    assert "loss/total" in dump
    assert not [what for what, secret in cluster.secrets.items() if secret in dump]
    lines = [" ".join(p.cmdline()) for host in cluster.hosts.values() for p in host.processes("")]
    assert not [what for what, secret in cluster.secrets.items() if any(secret in line for line in lines)]


def _holding(places: list[Path], secret: str) -> list[str]:
    files: list[Any] = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_ray_down(cluster: Cluster) -> None:
    """The head at once; workers when they have missed it for a minute."""
    assert cluster.type(["ray", "down", "--yes", *PLAIN, FILE], "down") == 0, cluster.said("down")
    wait_for("the end", lambda: not any(cluster.hosts[name].processes("raylet") for name in ("head", *WORKERS)))
