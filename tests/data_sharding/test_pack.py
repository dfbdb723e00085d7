"""Promises of packing: the same bytes however often it is killed, and a changed source is refused."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_sharding.datasets import coco
from data_sharding.datasets.base import Source
from data_sharding.pack import _locked, pack
from data_sharding.pack_reading import AHEAD
from data_sharding.shards import PackedDataset
from tests.data_sharding.packing import CATEGORIES, files, packed, plugin, record

ROOT = Path(__file__).parents[2]
HIT_UAV = ROOT / "../shared/data/hit_uav"

_CHILD = """
import sys, time
from pathlib import Path
from data_sharding.pack import pack
from tests.data_sharding.packing import plugin
print("ready", flush=True)
pack(None, plugin(40), "train", Path(sys.argv[1]), 30_000, lambda done, total: time.sleep(0.002))
"""


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split 'train' has no images"):
        packed(tmp_path, count=0)


def test_packing_twice_anywhere_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = packed(tmp_path / "a"), packed(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.uid == second.uid
    assert packed(tmp_path / "a").uid == first.uid


def test_a_pack_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    expected = files(packed(tmp_path / "whole").folder)
    folder, rng, killed = tmp_path / "killed", random.Random(0), 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", _CHILD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.06))
            os.kill(child.pid, signal.SIGKILL)
            killed += child.wait() == -signal.SIGKILL
        if not (folder / "manifest.json").exists():
            with pytest.raises(FileNotFoundError):
                PackedDataset.open(folder)
    assert killed >= 4
    packed(folder)
    assert files(folder) == expected


def test_an_interrupted_pack_goes_on_behind_its_last_shard(tmp_path: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 25:
            raise KeyboardInterrupt

    log: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        pack(None, plugin(40, read_log=log), "train", tmp_path, 30_000, stop)  # pyright: ignore[reportArgumentType]
    assert len(log) <= 25 + 1 + AHEAD  # one is being looked at
    written = len(list(tmp_path.glob("receipts/*")))
    log.clear()
    dataset = packed(tmp_path, read_log=log)
    assert written > 0
    assert len(set(log)) == 40 - dataset.shard_sizes[:written].sum()
    assert len(dataset) == 40


def test_progress_counts_up_to_all_images(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    pack(None, plugin(10), "train", tmp_path, progress=lambda *x: told.append(x))  # pyright: ignore[reportArgumentType]
    assert told == [(i, 10) for i in range(11)]


def test_images_are_permuted_once_so_that_neighbours_are_random(tmp_path: Path) -> None:
    dataset = packed(tmp_path, count=200)
    order = dataset.image_ids - 1000
    assert sorted(order.tolist()) == list(range(200))
    assert (np.abs(np.diff(order)) == 1).mean() < 0.05
    means = [order[dataset.groups == group].mean() for group in range(len(dataset.shards) - 1)]
    assert max(abs(mean - 99.5) for mean in means) < 60
    other = packed(tmp_path / "other", count=200, fingerprint="other labels")
    assert other.image_ids.tolist() != dataset.image_ids.tolist()


def test_shards_hold_whole_records_up_to_their_size(tmp_path: Path) -> None:
    dataset = packed(tmp_path, shard_bytes=12_000)
    assert len(dataset.shards) > 5
    # The footer with the place of each record comes on top.
    assert max(shard.bytes for shard in dataset.shards) < 12_000 + 3000
    assert packed(tmp_path / "tiny", shard_bytes=1).shard_sizes.tolist() == [1] * 40


@pytest.mark.parametrize(
    "changed",
    [{"fingerprint": "labels were edited"}, {"count": 41}, {"shard_bytes": 20_000}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_folder_packed_from_something_else_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    packed(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"was packed from something else .*Choose another folder"):
        packed(tmp_path, **changed)  # pyright: ignore[reportArgumentType]
    assert files(tmp_path) == before


def test_another_split_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    packed(tmp_path)
    with pytest.raises(ValueError, match="split was train, is val"):
        pack(None, plugin(40), "val", tmp_path, 30_000)  # pyright: ignore[reportArgumentType]


def test_two_packers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    with _locked(tmp_path), pytest.raises(BlockingIOError, match="another process is packing"):
        packed(tmp_path)
    packed(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_packing_again_heals_a_damaged_shard_to_the_same_bytes(tmp_path: Path, damage: str) -> None:
    dataset = packed(tmp_path)
    expected = files(tmp_path)
    path = tmp_path / dataset.shards[1].name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "missing":
        content[500] ^= 1
        path.write_bytes(content[: 900 if damage == "cut" else None])
    log: list[int] = []
    packed(tmp_path, read_log=log)
    assert files(tmp_path) == expected
    assert len(log) <= dataset.shard_sizes[1] + 1 + AHEAD


def test_images_that_changed_under_unchanged_labels_cannot_heal_a_shard(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    (tmp_path / dataset.shards[0].name).unlink()
    changed = int(dataset.image_ids[0]) - 1000
    with pytest.raises(ValueError, match="image files have changed"):
        packed(tmp_path, change=changed)


def test_shared_image_ids_and_foreign_labels_are_refused(tmp_path: Path) -> None:
    def module(read: object) -> SimpleNamespace:
        source = Source(count=4, fingerprint="f", read=read)  # pyright: ignore[reportArgumentType]
        return SimpleNamespace(categories=lambda _: CATEGORIES[:1], source=lambda *_: source)

    with pytest.raises(ValueError, match=r"image ids \[1000\] belong to more than one image"):
        pack(None, module(lambda _: record(0)), "train", tmp_path / "a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"labels \[.*\] outside \[0, 1\)"):
        pack(None, module(record), "train", tmp_path / "b")  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not HIT_UAV.is_dir(), reason="../shared/data/hit_uav is not on this machine")
def test_hit_uav_packs_in_a_few_seconds(tmp_path: Path) -> None:
    split = coco.Split(images=HIT_UAV / "normal_json/train", annotations=HIT_UAV / "coco/instances_train.json")
    config = coco.Config(train=split, ignore_categories=("DontCare",))
    start = time.process_time()
    dataset = pack(config, coco, "train", tmp_path, shard_bytes=8 << 20)
    assert time.process_time() - start < 10
    assert len(dataset) == 677
    assert len(dataset.shards) == 6
    assert [c.name for c in dataset.categories] == ["Person", "Car", "Bicycle", "OtherVehicle"]
    assert int(dataset.objects.sum()) == 5835
    by_id = {r.image_id: r for r in coco.records(config, "train")}
    for position in range(0, len(dataset), 50):
        found, expected = dataset.record(position), by_id[int(dataset.image_ids[position])]
        assert found.image == expected.image
        assert np.array_equal(found.boxes, expected.boxes)
