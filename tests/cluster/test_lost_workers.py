"""Whom a run lost is told in a few words, out of Ray's many."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from cluster.recovery import incidents, lost_workers
from cluster.recovery.lost_workers import NoteLostWorkers, describe, head_lost


def died(text: str) -> WorkerHealthCheckFailedError:
    cause = ActorDiedError()
    cause.error_msg = text
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=cause)


def test_the_dead_are_told_and_not_those_who_lost_them() -> None:
    failures = {
        0: RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        1: died(
            "The actor died unexpectedly before finishing this task.\n\tpid: 5\n\tip: 192.0.2.7\nThe actor is dead."
        ),
    }
    assert describe(failures) == "rank 1 died on 192.0.2.7"


def test_a_head_that_is_gone_is_told_with_what_to_do() -> None:
    lost = head_lost(ActorUnavailableError("RPC error: Socket closed", b"0" * 16))
    assert "the same command goes on" in str(lost)
    assert "Socket closed" in str(lost)
    assert head_lost(RuntimeError("of our own")) is None


def test_a_node_that_is_gone_is_told() -> None:
    text = "The actor died unexpectedly before finishing this task.\n\tip: 192.0.2.7\nits node has died."
    assert describe({3: died(text)}) == "rank 3 was lost with its node on 192.0.2.7"


def test_who_does_not_answer_is_told() -> None:
    assert describe({2: WorkerHealthCheckTimeoutError("hanging")}) == "rank 2 does not answer"
    assert describe({2: WorkerHealthCheckFailedError("failed", failure=ActorUnavailableError("away", b"0" * 16))}) == (
        "rank 2 died"
    )


def test_what_ray_tells_at_every_look_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lost_workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    callback = NoteLostWorkers(tmp_path)
    for seconds in (0, 4, 4, 60):
        now[0] += seconds
        callback.after_exception(None, {1: died("ip: 192.0.2.7")})
    callback.after_exception(None, {0: died("ip: 192.0.2.7")})
    assert [row["what"] for row in incidents.read(tmp_path)] == [f"rank {r} died on 192.0.2.7" for r in (1, 1, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [192.0.2.7]:11699. This",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [192.0.2.7]:5: Connection reset by peer",
    ],
)
def test_who_is_not_known_to_be_dead_is_told_by_the_place(text: str) -> None:
    assert describe({1: RuntimeError(text)}) == "rank 1 lost the connection to a rank on 192.0.2.7"


def test_where_nobody_is_known_to_be_dead_the_first_error_speaks(tmp_path: Path) -> None:
    NoteLostWorkers(tmp_path).after_exception(None, {1: RuntimeError("b\nc" * 200), 0: ValueError("a\n  b")})
    (row,) = incidents.read(tmp_path)
    assert row["what"] == "rank 0 failed: a b"
    assert row["ranks"] == [0, 1]
