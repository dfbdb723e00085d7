"""Sending a job: what goes along, what comes back, and what is refused before anything is sent."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from zipfile import ZipFile

import pytest

from benchmarks.fault_cluster import free_ports
from cluster import submitting
from cluster.grammar import ConfigError
from cluster.submitting import SECRETS, STOPPED, Submission, follow, readable, submit


class Status(Enum):
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    def is_terminal(self) -> bool:
        return self is not Status.RUNNING


@dataclass
class Info:
    status: Status
    driver_exit_code: int | None = None
    submission_id: str = "job"
    message: str = ""


@dataclass
class Server:
    """A job server that answers from a list; an error in it is raised."""

    log: list[str | Exception]
    infos: list[Info]
    sent: dict[str, Any] = field(default_factory=dict)
    tails: int = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """From the beginning each time, as Ray does; up to the first error, which is met but once."""
        self.tails += 1
        for number, entry in enumerate(self.log):
            if isinstance(entry, Exception):
                del self.log[number]
                raise entry
            yield entry

    def get_job_info(self, job: str) -> Info:
        return self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]

    def submit_job(self, **sent: Any) -> str:
        self.sent = sent
        return str(sent["submission_id"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(["one\n", "two\n"], [Info(Status.SUCCEEDED)])
    monkeypatch.setattr(submitting, "_client", lambda address: made)
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: None)
    return made


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (Info(Status.SUCCEEDED, 0), 0),
        (Info(Status.FAILED, 2), 2),
        (Info(Status.FAILED, None), 1),
        (Info(Status.STOPPED, None), STOPPED),
    ],
)
def test_the_jobs_exit_code_is_the_commands(server: Server, info: Info, code: int) -> None:
    server.infos = [Info(Status.RUNNING), info]
    told: list[str] = []
    assert follow("there", "job", told.append) == code
    assert "".join(told) == "one\ntwo\n"


def test_a_server_that_goes_away_in_the_middle_is_asked_again_and_nothing_is_told_twice(server: Server) -> None:
    server.log = ["one\n", RuntimeError("closed"), "two\n", ConnectionError("refused"), "three\n"]
    told: list[str] = []
    assert follow("there", "job", told.append) == 0
    assert "".join(told) == "one\ntwo\nthree\n"
    assert server.tails == 3


def test_a_server_that_stays_away_is_an_error_that_tells_how_to_ask_for_the_job(server: Server) -> None:
    server.log = [RuntimeError("closed")] * 2
    with pytest.raises(ConfigError, match="ray job status --address there job"):
        follow("there", "job", lambda text: None, patience=-1)


def test_the_tree_goes_along_without_secrets_and_the_recipe_by_its_place_in_it(server: Server, tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "mine.yaml"
    order = Submission(address="there", verb="train", recipe=recipe, settings=("name=a b",), name="run", root=tmp_path)
    first = submit(order)
    assert first.startswith("run-")
    assert server.sent["entrypoint"] == "python -m cluster.train recipes/mine.yaml 'name=a b'"
    environment = server.sent["runtime_env"]
    assert environment["working_dir"] == str(tmp_path)
    assert {".env", "*.pem", "id_ed25519*", ".git", "/runs"} <= set(environment["excludes"])
    assert submit(order) != first  # the same run again is another job
    with pytest.raises(ConfigError, match="only that tree is sent"):
        submit(Submission(address="there", verb="train", recipe=Path("/elsewhere.yaml"), settings=(), name="run"))


def test_what_is_packed_holds_no_keys_environments_data_or_ignored_files(tmp_path: Path) -> None:
    """Packed by Ray's own code, with what is left out by us."""
    from ray._private.runtime_env.packaging import create_package

    sent = ("cluster/train.py", "recipes/mine.yaml", "environment.py", "requirements.lock")
    kept = (
        ".env", "deep/.env", ".env.local", "node.env", "tls.pem", "deep/id_ed25519", "id_rsa.pub", ".netrc", ".pgpass",
        "auth_token", ".ray/auth_token", ".aws/credentials", ".ssh/config", ".git/config", ".venv/bin/python",
        "runs/run/metrics.jsonl", "data/a.json", "image.jpg", "deep/scan.png", "taps.arrow", "student.safetensors",
        "teacher.pth", "last.pt", "set.zip", "mlflow.db", "notes/mine.txt",
    )  # fmt: skip
    tree = tmp_path / "tree"
    for name in (*sent, *kept):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / ".gitignore").write_text("notes/\n")
    create_package(str(tree), tmp_path / "sent.zip", include_gitignore=True, excludes=list(SECRETS))
    with ZipFile(tmp_path / "sent.zip") as package:
        names = {name for name in package.namelist() if not name.endswith("/")}
    assert names == {*sent, ".gitignore"}


def test_a_setting_that_holds_a_secret_of_the_environment_is_named_not_shown() -> None:
    found = readable(
        ["tracking.uri=http://me:geheim1234@host", "optim.lr=1"], {"MLFLOW_TRACKING_PASSWORD": "geheim1234"}
    )
    assert found == ["tracking.uri"]
    assert readable(["a=1"], {"X_TOKEN": "1", "EMPTY_TOKEN": ""}) == []


class Doorkeeper(BaseHTTPRequestHandler):
    """Answers as Ray's job server does to who has no token, or a wrong one."""

    def do_GET(self) -> None:
        self.send_response(403 if "Authorization" in self.headers else 401)
        self.end_headers()
        self.wfile.write(b"Unauthorized")

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is no log."""


@pytest.mark.parametrize("token", ["0" * 64, None])
def test_a_server_that_refuses_is_told_in_a_persons_words(token: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path)} | ({} if token is None else {"RAY_AUTH_TOKEN": token})
    with HTTPServer(("127.0.0.1", 0), Doorkeeper) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        words = [f"storage={tmp_path}", "--address", f"http://127.0.0.1:{server.server_port}"]
        command = [sys.executable, "-m", "cluster.submit", "digits_student", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        server.shutdown()
    assert done.returncode == 2, done.stderr
    assert "asks for a token and did not get the right one" in done.stderr
    assert "Traceback" not in done.stderr


def test_relative_paths_and_a_missing_server_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster.submit", "digits_student", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    relative = run()
    assert relative.returncode == 2
    assert "every path must be absolute" in relative.stderr
    (port,) = free_ports(1)
    nobody = run(f"storage={tmp_path}", "--address", f"http://127.0.0.1:{port}")
    assert nobody.returncode == 2
    assert "no job server answers" in nobody.stderr
