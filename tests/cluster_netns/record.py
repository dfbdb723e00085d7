"""An MLflow server on PostgreSQL, with passwords, on a host of its own: what a group of people has."""

import importlib.util
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster_netns.hosts import PATIENCE, Host, wait_for

PORT = 5000
USER = "minnow"
PACKAGES = ("psycopg", "flask_wtf")
DATABASES = ("runs", "people")
PEOPLE = """\
[mlflow]
default_permission = READ
database_uri = postgresql://{user}@127.0.0.1/people
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def why_not() -> str | None:
    """What this machine lacks for such a server; None: nothing."""
    if programs() is None:
        return "PostgreSQL's server is not installed"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"a server of this kind needs the packages {', '.join(missing)}" if missing else None


def programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian keeps off the path; None: not installed."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))] or [shutil.which("initdb")]
    return Path(found[-1]).parent if found[-1] else None


@dataclass(frozen=True, kw_only=True)
class Record:
    """A running server, and who may write to it."""

    host: Host
    uri: str
    user: str
    password: str
    database_password: str

    def dump(self) -> str:
        """All that both databases hold, as text."""
        return "".join(
            _as_postgres(self.host, ["pg_dump", "-h", "/tmp/sockets", "-U", USER, "--inserts", name])
            for name in DATABASES
        )


def started_record(host: Host) -> Record:
    """Start both servers on `host`; they end with it. Passwords go by files and environments, never as arguments."""
    password, database_password = secrets.token_hex(16), secrets.token_hex(16)
    (host.place / "tmp" / "password").write_text(database_password)
    database = ["initdb", "-D", "/tmp/database", "-U", USER, "--pwfile=/tmp/password", "--auth-host=scram-sha-256"]
    _as_postgres(host, ["mkdir", "-m", "700", "/tmp/sockets"])
    _as_postgres(host, [*database, "--auth-local=trust", "--encoding=UTF8", "--no-locale", "--no-sync"])
    options = "-c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp/sockets -c fsync=off"
    _as_postgres(host, ["pg_ctl", "start", "-w", "-D", "/tmp/database", "-l", "/tmp/database/log", "-o", options])
    for name in DATABASES:
        _as_postgres(host, ["createdb", "-h", "/tmp/sockets", "-U", USER, name])
    people = host.place / "home" / "people.ini"
    people.touch(mode=0o600)
    people.write_text(PEOPLE.format(user=USER, password=password))
    log = host.place / "mlflow.log"
    words = ["mlflow", "server", "--app-name", "basic-auth", "--host", host.address, "--port", str(PORT)]
    words += ["--allowed-hosts", f"{host.name}:{PORT}", "--workers", "1"]
    words += ["--backend-store-uri", f"postgresql://{USER}@127.0.0.1/runs", "--artifacts-destination", "/tmp/artifacts"]
    environment = {
        "PGPASSWORD": database_password,
        "MLFLOW_AUTH_CONFIG_PATH": "/mnt/home/people.ini",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # where the server's own packages may be
    }
    server = host.start(words, log, environment)

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        return host.run(["bash", "-c", f"</dev/tcp/{host.address}/{PORT}"], host.place / "wait.log") == 0

    wait_for("the MLflow server", answers, log)
    return Record(
        host=host,
        uri=f"http://{host.name}:{PORT}",
        user=USER,
        password=password,
        database_password=database_password,
    )


def _as_postgres(host: Host, words: Sequence[str]) -> str:
    """What a command says; PostgreSQL refuses to run as root."""
    own = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    inside = [
        "nsenter",
        "--target",
        str(host.pid),
        "--all",
        "--wd=/tmp",
        "env",
        "-i",
        f"PATH={programs()}:/usr/bin:/bin",
    ]
    with (host.place / "postgres.log").open("a") as log:
        return subprocess.run(
            [*inside, *own, *words], stdout=subprocess.PIPE, stderr=log, text=True, check=True, timeout=PATIENCE
        ).stdout
