"""Promises of staging: a copy is whole and right or there is an error, and the folder keeps its limit."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import xxhash

from data_sharding.remote import Remote, RemoteError
from data_sharding.shards import ShardCorrupt
from data_sharding.staging import SourceCorrupt, Staging, StagingFull, Wanted

ROOT = Path(__file__).parents[2]


def source(folder: Path, files: dict[str, bytes]) -> dict[str, Wanted]:
    """These files behind a URL."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    remote = Remote(f"file://{folder}", pauses=(0.0, 0.0))
    return {
        name: Wanted(source=remote, name=name, bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
        for name, content in files.items()
    }


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was fetched."""
    count: Counter[str] = Counter()
    real = Remote.fetch

    def fetch(self: Remote, name: str, target: Path) -> None:
        count[name] += 1
        real(self, name, target)

    monkeypatch.setattr(Remote, "fetch", fetch)
    return count


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_nothing_is_staged_before_it_is_asked_for(tmp_path: Path) -> None:
    Staging(tmp_path / "local", 10)
    assert copies(tmp_path / "local") == set()
    with pytest.raises(ValueError, match="at least 1 byte, got 0"):
        Staging(tmp_path / "local", 0)


def test_a_file_is_copied_once_and_kept_under_a_name_of_its_own(tmp_path: Path, fetched: Counter[str]) -> None:
    wanted = source(tmp_path / "far", {"v000/a-1.arrow": b"a" * 10, "v001/a-1.arrow": b"b" * 10})
    staging = pickle.loads(pickle.dumps(Staging(tmp_path / "local", 100)))
    for _ in range(3):
        for file, content in zip(wanted.values(), (b"a", b"b"), strict=True):
            held = staging.hold(file)
            assert held.path.read_bytes() == content * 10
            held.release()
    assert set(fetched.values()) == {1}
    assert copies(tmp_path / "local") == {"v000-a-1.arrow", "v001-a-1.arrow"}


def test_the_least_recently_used_copy_makes_room_but_not_one_that_is_held(
    tmp_path: Path, fetched: Counter[str]
) -> None:
    wanted = source(tmp_path / "far", {name: name.encode() * 10 for name in "abcde"})
    staging = Staging(tmp_path / "local", 35)
    first = staging.hold(wanted["a"])
    for age, name in enumerate("bc"):
        staging.hold(wanted[name]).release()
        os.utime(tmp_path / "local" / name, (age, age))
    staging.hold(wanted["d"]).release()
    assert copies(tmp_path / "local") == {"a", "c", "d"}, "b was used least recently"
    others = [staging.hold(wanted[name]) for name in "cd"]
    with pytest.raises(StagingFull, match=r"e needs 1e-08 GB, and 3e-08 GB of the limit of 3.5e-08 GB are in use"):
        staging.hold(wanted["e"])
    assert copies(tmp_path / "local") == {"a", "c", "d"}
    others[0].release()
    staging.hold(wanted["e"]).release()
    assert copies(tmp_path / "local") == {"a", "d", "e"}
    first.release()
    assert fetched == Counter("abcde")


def test_a_file_that_is_larger_than_the_limit_is_an_error(tmp_path: Path) -> None:
    wanted = source(tmp_path / "far", {"a": b"a" * 11})
    with pytest.raises(StagingFull, match="raise resources"):
        Staging(tmp_path / "local", 10).hold(wanted["a"])
    assert copies(tmp_path / "local") == set()


@pytest.mark.parametrize("damage", [b"a" * 9 + b"b", b"a" * 9, b"a" * 11, b""])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, fetched: Counter[str], damage: bytes) -> None:
    wanted, staging = source(tmp_path / "far", {"a": b"a" * 10})["a"], Staging(tmp_path / "local", 100)
    staging.hold(wanted).release()
    (tmp_path / "local" / "a").write_bytes(damage)
    reading = (tmp_path / "local" / "a").open("rb")
    held = staging.hold(wanted)
    assert held.path.read_bytes() == b"a" * 10
    assert reading.read() == damage, "whoever has the old file open keeps it as it was"
    held.release()
    reading.close()
    assert fetched["a"] == 2


@pytest.mark.parametrize("damage", [b"a" * 9 + b"b", b"a" * 9, b"a" * 11, b""])
def test_a_damaged_source_is_an_error_that_names_it_and_what_was_expected(
    tmp_path: Path, fetched: Counter[str], damage: bytes
) -> None:
    wanted, staging = source(tmp_path / "far", {"a": b"a" * 10})["a"], Staging(tmp_path / "local", 100)
    (tmp_path / "far" / "a").write_bytes(damage)
    with pytest.raises(SourceCorrupt) as told:
        staging.hold(wanted)
    assert f"file://{tmp_path / 'far'}/a: expected 10 bytes with xxh3_128 {wanted.xxh3_128}" in str(told.value)
    assert isinstance(told.value, ShardCorrupt)
    assert fetched["a"] == 2, "once, and once more"
    assert copies(tmp_path / "local") == set()
    (tmp_path / "far" / "a").write_bytes(b"a" * 10)
    staging.hold(wanted).release()


def test_a_missing_source_and_one_that_fails_again_and_again_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    wanted, staging = source(tmp_path / "far", {"a": b"a" * 10})["a"], Staging(tmp_path / "local", 100)
    (tmp_path / "far" / "a").rename(tmp_path / "far" / "b")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'far'}/a"):
        staging.hold(wanted)
    (tmp_path / "far" / "b").rename(tmp_path / "far" / "a")
    left, real = [2], LocalFileSystem.get_file

    def cut(self: Any, path: str, target: str, **named: Any) -> None:
        real(self, path, target, **named)
        left[0] -= 1
        if left[0] >= 0:
            os.truncate(target, 3 * left[0])

    monkeypatch.setattr(LocalFileSystem, "get_file", cut)
    staging.hold(wanted).release()
    (tmp_path / "local" / "a").unlink()
    left[0] = 3
    with pytest.raises(RemoteError, match=f"{tmp_path / 'far'}/a: failed 3 times.*0 of 10 bytes arrived"):
        staging.hold(wanted)
    assert copies(tmp_path / "local") == set()


def test_what_a_killed_process_left_is_swept_and_one_at_work_is_left_alone(tmp_path: Path) -> None:
    from data_sharding.files import locked

    wanted, staging = source(tmp_path / "far", {"a": b"a" * 10, "b": b"b" * 10}), Staging(tmp_path / "local", 25)
    leftovers = [tmp_path / "local" / f"{name}.tmp.10.{'0' * 32}" for name in "ac"]
    for leftover in leftovers:
        leftover.write_bytes(b"12345")
    with locked(tmp_path / "local" / "locks" / "c.fetch"):  # c is on its way
        held = staging.hold(wanted["a"])
        assert copies(tmp_path / "local") == {"a", leftovers[1].name}
        with pytest.raises(StagingFull):
            staging.hold(wanted["b"])
    staging.hold(wanted["b"]).release()
    assert copies(tmp_path / "local") == {"a", "b"}
    held.release()


def test_the_processes_of_a_node_share_copies_and_limit(tmp_path: Path) -> None:
    files = {f"s{i}": bytes([i]) * 1000 for i in range(12)}
    source(tmp_path / "far", files)
    log, program = tmp_path / "log", [sys.executable, "-m", "tests.data_sharding.staging_process"]
    for limit in (12_000, 5_000):
        command = [*program, str(tmp_path / "far"), str(tmp_path / f"local{limit}"), str(limit), str(log)]
        ranks = [subprocess.Popen([*command, number], cwd=ROOT) for number in "123"]
        assert [rank.wait() for rank in ranks] == [0, 0, 0]
        found = [line.split() for line in log.read_text().splitlines()]
        log.unlink()
        assert max(int(total) for _, total in found) <= limit
        if limit == 12_000:
            assert Counter(name for name, _ in found) == Counter(list(files)), "each was fetched by one of them"
        assert sum(p.stat().st_size for p in (tmp_path / f"local{limit}").iterdir() if p.is_file()) <= limit


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/caches", "s3://secret@bucket/caches"])
def test_a_url_with_a_secret_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(ValueError, match="holds a secret") as told:
        Remote(url)
    assert "secret@" not in str(told.value)
    assert "key" not in str(told.value).replace("_KEY", "")


def test_a_url_of_an_unknown_kind_says_so(tmp_path: Path) -> None:
    for url in ("folder", "", "://x"):
        with pytest.raises(ValueError, match="expected a URL such as"):
            Remote(url)
    with pytest.raises((ValueError, RemoteError), match="nosuch://x/a"):
        Remote("nosuch://x", pauses=()).read("a")
