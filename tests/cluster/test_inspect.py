"""`python -m cluster.inspect`: facts, what is damaged, and a picture, of what lies here or elsewhere."""

from pathlib import Path

import pytest
from PIL import Image

from cluster.inspect import main
from data_sharding.publish import publish
from data_sharding.remote import Remote
from data_sharding.shards import PackedDataset
from data_sharding.views import ViewTable
from tests.data_sharding.test_cache_damage import rows_of, shard_files
from tests.data_sharding.tiny import KEYS, tiny_dataset, tiny_key, tiny_views, write


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedDataset, ViewTable]:
    """Where a run leaves its data."""
    dataset = tiny_dataset(tmp_path_factory.mktemp("runs") / "data" / "tiny" / "train", count=4)
    return dataset, tiny_views(dataset)


@pytest.fixture
def cache(few: tuple[PackedDataset, ViewTable], request: pytest.FixtureRequest) -> Path:
    folder = few[0].folder.parents[2] / "caches" / request.node.name[:40]
    return write(folder, tiny_key(*few, **KEYS["int8 and sparse"]), *few).folder


def test_where_nothing_is_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (str(tmp_path), f"file://{tmp_path}/nothing"):
        assert main([place]) == 2
        told = capsys.readouterr()
        assert "holds no finished packed split or teacher cache: manifest.json missing" in told.err
    assert main([str(tmp_path), "--png", "x.png"]) == 2
    assert "--png needs --sample" in capsys.readouterr().err


def test_a_cache_and_a_pack_are_described_here_and_elsewhere(
    cache: Path, few: tuple[PackedDataset, ViewTable], capsys: pytest.CaptureFixture[str]
) -> None:
    publish(cache, Remote("memory://shelf/cache"))
    for place in (str(cache), "memory://shelf/cache"):
        assert main([place, "--verify"]) == 0
        told = capsys.readouterr().out
        assert told.startswith("teacher cache")
        assert place in told
        for fact in (
            "4 x 2",
            "arithmetic",
            "sparse_channel, sparse_position, int8_channel",
            "each by its own checksum",
        ):
            assert fact in told
    assert main([f"file://{few[0].folder}", "--verify"]) == 0
    told = capsys.readouterr().out
    assert "left, right" in told
    assert few[0].uid in told


def test_everything_that_is_damaged_is_in_one_table_and_the_exit_code(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = max(shard_files(cache), key=lambda p: rows_of(p)[-1][2] - rows_of(p)[-1][1])
    (image, view), start, _ = rows_of(path)[-1]
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    (cache / "key.json").write_bytes((cache / "key.json").read_bytes().replace(b"arithmetic", b"arithmetik"))
    assert main([str(cache), "--verify"]) == 3
    told = capsys.readouterr().out
    assert "2 thing(s) are not as they were written" in told
    assert path.name in told
    assert f"image {image}, view {view}" in told
    assert "key.json" in told
    (cache / "manifest.json").write_bytes(b"{")
    assert main([str(cache)]) == 3
    assert "manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["found", "named", "away"])
def test_a_sample_is_drawn_with_its_image_where_that_is_at_hand(
    cache: Path, few: tuple[PackedDataset, ViewTable], tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str
) -> None:
    png = tmp_path / "sample.png"
    place = str(cache) if data == "found" else f"file://{cache}"
    named = ["--data", str(few[0].folder)] if data == "named" else []
    assert main([place, "--sample", "5", "--png", str(png), *named]) == 0
    told = capsys.readouterr().out
    assert ("images/" in told) == (data != "away")
    assert ("not drawn" in told) == (data == "away")
    assert "RMS of p4" in told
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 400, "the image and three taps side by side"


def test_a_packed_image_is_drawn_and_a_wrong_number_is_refused(
    few: tuple[PackedDataset, ViewTable], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "sample.png"
    assert main([str(few[0].folder), "--sample", "2", "--png", str(png)]) == 0
    assert "objects" in capsys.readouterr().out
    with Image.open(png) as picture:
        assert picture.format == "PNG"
    assert main([str(few[0].folder), "--sample", "4"]) == 2
    assert "there are 4 samples, 0 to 3" in capsys.readouterr().err
