"""Send a verb to a running Ray cluster as a job: the working tree goes along, its log comes back, and its exit code."""

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.driver import ROOT, say
from cluster.grammar import ConfigError

SECRETS = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_ed25519*", "id_ecdsa*", ".netrc",
    ".pgpass", "credentials", "auth_token", ".aws", ".ssh", ".ray", ".git", ".venv", "/runs", "/data", "mlflow.db",
    "*.safetensors", "*.pt", "*.pth", "*.onnx", "*.arrow", "*.tar", "*.tar.gz", "*.tgz", "*.zip", "*.jpg", "*.jpeg",
    "*.png", "*.tif", "*.tiff",
)  # fmt: skip
"""Left out of what is sent, beside all that .gitignore names: secrets, environments, data and weights."""
STOPPED = 130
"""Exit code of a job that somebody stopped."""
PATIENCE = 600.0
"""Seconds for which a job server may be away (its head restarts, a tunnel breaks) before the follower gives up."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is asked of the cluster."""

    address: str
    """The job server's, such as http://127.0.0.1:8265."""
    verb: str
    recipe: Path
    settings: tuple[str, ...]
    """`key=value` as typed."""
    name: str
    """The run's; the job's id begins with it."""
    root: Path = ROOT
    """The tree that is sent."""


def submit(submission: Submission) -> str:
    """Send the job; its id. ConfigError where the server cannot be reached or refuses the token."""
    recipe = _within(submission.recipe, submission.root)
    words = ["python", "-m", f"cluster.{submission.verb}", recipe, *submission.settings]
    job = f"{submission.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    environment = {"working_dir": str(submission.root), "excludes": list(SECRETS)}
    client = _client(submission.address)
    return _asked(
        submission.address,
        lambda: client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=job,
            runtime_env=environment,
            metadata={"run": submission.name, "recipe": recipe},
        ),
    )


def follow(address: str, job: str, write: Callable[[str], Any], patience: float = PATIENCE) -> int:
    """Pass the job's log on until it ends; its exit code, `STOPPED` where it was stopped.

    A server that goes away is asked again for `patience` seconds; what it had told is not told twice.
    """
    client, log = _client(address), _Log(write)
    away_since = None
    while True:
        try:
            asyncio.run(log.follow(client, job))
            info = client.get_job_info(job)
        except (RuntimeError, OSError, ConnectionError) as error:
            now = time.monotonic()
            if away_since is None:
                say(f"the job server does not answer ({_short(error)}); asking again for {patience:.0f} s")
                away_since = now
            if now - away_since > patience:
                raise ConfigError(
                    f"{address} has not answered for {patience:.0f} s; job {job} may still run there: "
                    f"`ray job status --address {address} {job}`"
                ) from error
            time.sleep(1)
            continue
        away_since = None
        if info.status.is_terminal():
            return _code(info)
        time.sleep(0.5)


def stop(address: str, job: str) -> None:
    """Ask the cluster to end the job."""
    _asked(address, lambda: _client(address).stop_job(job))


class _Log:
    """A job's log, which the server tells from the beginning each time it is asked."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write, self._told = write, 0

    async def follow(self, client: Any, job: str) -> None:
        """Pass on what was not passed on before, until the connection ends."""
        seen = 0
        async for text in client.tail_job_logs(job):
            seen += len(text)
            new = text[len(text) - max(0, min(len(text), seen - self._told)) :]
            if new:
                self._write(new)
                self._told = seen


def _code(info: Any) -> int:
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return 0
    say(f"job {info.submission_id} ended as {status}" + (f": {info.message}" if info.message else ""))
    return STOPPED if status == "STOPPED" else info.driver_exit_code or 1


def _within(recipe: Path, root: Path) -> str:
    """The recipe's path inside the tree that is sent."""
    try:
        return str(recipe.resolve().relative_to(root.resolve()))
    except ValueError:
        raise ConfigError(
            f"{recipe} is not in {root}, and only that tree is sent; copy the recipe into it, or lay its settings over "
            "a shipped one"
        ) from None


def _client(address: str) -> Any:
    # A cluster of ours asks for the token; without this variable Ray's client would not send it.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    return _asked(address, lambda: JobSubmissionClient(address))


def _asked(address: str, act: Callable[[], Any]) -> Any:
    from ray.exceptions import AuthenticationError

    try:
        return act()
    except ConnectionError as error:
        raise ConfigError(
            f"no job server answers at {address} ({_short(error)}); is the cluster up, and the tunnel open? "
            "(ssh -L 8265:127.0.0.1:8265 USER@HEAD)"
        ) from error
    except (AuthenticationError, RuntimeError) as error:
        if isinstance(error, AuthenticationError) or "RAY_AUTH_TOKEN" in str(error):
            raise ConfigError(
                f"{address} asks for a token and did not get the right one; copy the cluster's ~/.ray/auth_token here "
                "(chmod 600), or point RAY_AUTH_TOKEN_PATH at it"
            ) from error
        raise


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def readable(settings: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The settings whose text holds the value of a variable of the environment that is named like a secret."""
    values = {v for k, v in environment.items() if len(v) >= 8 and any(w in k for w in ("TOKEN", "SECRET", "PASSWORD"))}
    return [text.partition("=")[0] for text in settings if any(value in text for value in values)]
