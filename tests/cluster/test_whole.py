"""Only checkpoints that are as every rank wrote them are resumed from."""

import json
from pathlib import Path

import pytest

from cluster import training
from cluster.grammar import ConfigError
from cluster.recovery import whole
from tests.cluster.test_build import recipe


def write(train: Path, name: str, step: int, workers: int = 2) -> Path:
    folder = train / f"checkpoint_{name}"
    folder.mkdir(parents=True)
    (folder / "minnow.json").write_text(json.dumps({"step": step, "workers": workers}))
    for rank in range(workers):
        own = train / "own"
        own.mkdir()
        (own / f"engine_{rank:05d}.pt").write_bytes(bytes([rank]) * 100)
        if rank == 0:
            (folder / "minnow.json").rename(own / "minnow.json")
        assert whole.seal(own, rank) > 100
        for path in own.iterdir():
            path.rename(folder / path.name)
        own.rmdir()
    return folder


def test_a_run_that_has_saved_nothing_begins_anew(tmp_path: Path) -> None:
    assert whole.newest(tmp_path / "train") == (None, [])
    whole.tidy(tmp_path / "train", 2)


def test_the_one_of_the_most_steps_is_the_newest(tmp_path: Path) -> None:
    """Not the one of the latest name: another node's clock may have been behind."""
    first, second = write(tmp_path, "2026-01-02", 8), write(tmp_path, "2026-01-01", 12)
    assert whole.newest(tmp_path) == (second, [])
    assert whole.damage(first) == ""


@pytest.mark.parametrize("name", ["engine_00000.pt", "engine_00001.pt", "minnow.json", "sealed_00000.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_file_that_is_not_as_it_was_written_is_told_and_passed_over(tmp_path: Path, name: str, how: str) -> None:
    before, damaged = write(tmp_path, "1", 4), write(tmp_path, "2", 8)
    path = damaged / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    if how == "missing":
        path.unlink()
    chosen, wrong = whole.newest(tmp_path)
    assert chosen == before
    assert len(wrong) == 1
    assert wrong[0].startswith("checkpoint_2: ")


def test_a_rank_that_had_no_time_to_write_leaves_no_whole_one(tmp_path: Path) -> None:
    damaged = write(tmp_path, "2", 8)
    for path in (*damaged.glob("*_00001.*"),):
        path.unlink()
    assert whole.newest(tmp_path)[0] is None


def listed(train: Path, *names: str) -> Path:
    path = train / whole.SNAPSHOT
    results = [{"checkpoint_dir_name": f"checkpoint_{name}"} for name in names]
    path.write_text(json.dumps({"checkpoint_results": results, "latest_checkpoint_result": results[-1]}))
    return path


def test_tidying_leaves_the_newest_whole_ones(tmp_path: Path) -> None:
    for number in range(1, 5):
        write(tmp_path, str(number), number)
    (tmp_path / "checkpoint_4" / "engine_00001.pt").unlink()
    (tmp_path / "checkpoint_5").mkdir()
    snapshot = listed(tmp_path, "2", "3")
    (told,) = [told for told in whole.tidy(tmp_path, 2) if "checkpoint_4" in told]
    assert told.startswith("checkpoint_4: ")
    assert sorted(path.name for path in tmp_path.glob("checkpoint_*") if path.is_dir()) == [
        "checkpoint_2",
        "checkpoint_3",
    ]
    assert snapshot.exists()


def test_checkpoints_of_an_earlier_version_are_told_apart_from_what_a_kill_has_cut(tmp_path: Path) -> None:
    write(tmp_path, "1", 4)
    cut, early, late = write(tmp_path, "2", 8), write(tmp_path, "3", 12), write(tmp_path, "4", 16)
    (cut / "sealed_00001.json").unlink()
    for path in (*early.glob("sealed_*"), *late.glob("sealed_*")):
        path.unlink()
    assert whole.unsealed(tmp_path) == [], "without a list of Ray Train's nobody says that they were finished"
    listed(tmp_path, "1", "2", "3")
    assert whole.unsealed(tmp_path) == ["checkpoint_3"]


@pytest.mark.parametrize("content", ["", "{", "[]", None])
def test_a_list_of_ray_trains_that_it_would_refuse_is_deleted(tmp_path: Path, content: str | None) -> None:
    write(tmp_path, "1", 4)
    snapshot = listed(tmp_path, "1", "gone")
    if content is not None:
        snapshot.write_text(content)
    assert whole.tidy(tmp_path, 2) == []
    assert not snapshot.exists()
    assert whole.newest(tmp_path)[0] == tmp_path / "checkpoint_1"


def test_a_run_of_an_earlier_version_is_refused_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    config = recipe(tmp_path, tmp_path)
    train = tmp_path / config.name / "train"
    old = write(train, "1", 4)
    for path in old.glob("sealed_*"):
        path.unlink()
    listed(train, "1")
    with pytest.raises(ConfigError, match=r"checkpoints of an earlier version \(checkpoint_1\).*nothing was changed"):
        training.train(config)
    assert (old / "engine_00001.pt").exists()
