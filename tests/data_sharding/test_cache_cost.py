import shutil
from pathlib import Path
from typing import Any

import pytest

from data_sharding.cache.cost import NotEnoughSpace, break_even, require_space


def test_break_even_follows_the_measured_table() -> None:
    """R101 at once and twice the resolution on 8 H200 (cache.md, section 4), dense int8 from NVMe."""
    common: dict[str, Any] = {"student_seconds": 1 / 60, "read_bandwidth": 7e9, "write_bandwidth": 7e9, "gpus": 8}
    small = break_even(teacher_seconds=1.9e-3, bytes_per_image=11.47e6, epochs=12, **common)
    assert small.largest_gain == pytest.approx(1.11, abs=0.01)
    assert small.pays
    large = break_even(teacher_seconds=7.4e-3, bytes_per_image=22.9e6, epochs=12, **common)
    assert large.largest_gain == pytest.approx(1.45, abs=0.01)
    assert large.largest_bytes == pytest.approx(21e6, rel=0.01)
    assert large.gain < 1
    assert not large.pays
    assert "does not pay" in large.sentence
    assert "limited by reading" in large.sentence


def test_a_view_per_epoch_never_pays_for_one_student() -> None:
    settings: dict[str, Any] = {
        "student_seconds": 0.01,
        "teacher_seconds": 0.1,
        "bytes_per_image": 1e5,
        "read_bandwidth": 1e9,
        "write_bandwidth": 1e9,
        "gpus": 1,
        "epochs": 12,
    }
    assert not break_even(**settings, views=12).pays
    assert break_even(**settings, views=12, students=2).pays
    assert break_even(**settings, views=1).pays
    with pytest.raises(ValueError, match="positive"):
        break_even(**(settings | {"gpus": 0}))


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    folder = tmp_path / "not" / "there" / "yet"
    for total, free, left in ((10, 1.5, 1), (250, 6, 4), (4000, 6, 4)):
        usage = shutil.disk_usage(tmp_path)._replace(total=total * gib, free=int(free * gib))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        require_space(folder, left * gib)
        with pytest.raises(NotEnoughSpace, match=rf"GiB are needed, {free:.2f} GiB of {total}.00 GiB are free"):
            require_space(folder, left * gib + 1)
