"""Who holds up a run is told from signs of life; nobody is blamed who moves."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from cluster.recovery import incidents, pulse
from cluster.recovery.pulse import DONE, Pulse, Sign, Watch
from data_sharding.world import World


def sign(beat: int, moved: int, **more: Any) -> Sign:
    return {"beat": beat, "moved": moved, "step": 7, "doing": "training", "process": 1, "host": "node", **more}


def test_who_moves_is_not_blamed() -> None:
    watch = Watch(10)
    for second in range(100):
        assert watch.look({0: sign(second, second // 9), 1: sign(second, 5)}, second) == {}


def test_a_process_that_does_not_beat_is_the_one() -> None:
    watch = Watch(10)
    told = [watch.look({0: sign(second, 8), 1: sign(3, 8)}, second) for second in range(12)]
    assert not any(told[:-1])
    assert told[-1] == {1: "no sign of life for 11 s, training at step 7, process 1 on node"}


def test_where_all_beat_the_one_that_is_behind_is_the_one() -> None:
    watch = Watch(10)
    told = [watch.look({r: sign(second, 8 - (r == 2)) for r in range(4)}, second) for second in range(12)]
    assert told[-1] == {2: "it is behind, training at step 7, process 1 on node"}


def test_one_that_never_began_is_the_one() -> None:
    watch = Watch(10)
    told = [watch.look({0: sign(second, 1), 1: {}}, second) for second in range(12)]
    assert told[-1] == {1: "no sign of life for 11 s, it has not begun"}


def test_nobody_waits_for_one_that_is_done() -> None:
    watch = Watch(10)
    for second in range(8):
        assert watch.look({0: sign(second, second), 1: sign(3, 8, doing=DONE)}, second) == {}
    assert watch.look({0: sign(9, 9, doing=DONE), 1: sign(3, 8, doing=DONE)}, 100) == {}


def test_a_sign_of_another_start_counts_for_nothing(tmp_path: Path) -> None:
    first = Pulse(tmp_path, World(rank=1, size=2), "first", 1000)
    first.close()
    second = Pulse(tmp_path, World(rank=0, size=2), "second", 1000)
    with second.doing("saving"):
        signs = second._signs()
    second.close()
    assert signs[1] == {}
    assert signs[0]["doing"] == "saving"
    pulse.forget(tmp_path)
    assert not (tmp_path / pulse.FOLDER).exists()


def test_a_process_that_stands_still_ends_itself_and_says_why(tmp_path: Path) -> None:
    program = f"""
        import threading
        from pathlib import Path
        from cluster.recovery.pulse import Pulse
        from data_sharding.world import World
        pulse = Pulse(Path({str(tmp_path)!r}), World(), "start", 0.5)
        pulse.at(3)
        threading.Event().wait()
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(words, cwd=Path(__file__).parents[2], timeout=120, check=False).returncode == -9
    (row,) = incidents.read(tmp_path)
    assert row["what"].startswith("rank 0 hangs: it is behind, training at step 3, process")
    assert row["what"].endswith("no rank has moved for 0 s")
    assert json.loads((tmp_path / "pulse" / "00000.json").read_text())["attempt"] == "start"


def test_where_the_disk_takes_no_signs_nobody_is_blamed(tmp_path: Path) -> None:
    program = f"""
        import shutil, time
        from pathlib import Path
        from cluster.recovery.pulse import Pulse
        from data_sharding.world import World
        pulse = Pulse(Path({str(tmp_path)!r}), World(), "start", 0.5)
        shutil.rmtree({str(tmp_path / "pulse")!r})
        while pulse._beat < 10:
            time.sleep(0.05)
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(words, cwd=Path(__file__).parents[2], timeout=120, check=False).returncode == 0


def test_a_worker_of_an_earlier_start_ends_itself(tmp_path: Path) -> None:
    """As one does on a node that nobody reaches any more."""
    program = f"""
        import threading, time
        from pathlib import Path
        from cluster.recovery.pulse import Pulse, begin
        from data_sharding.world import World
        folder = Path({str(tmp_path)!r})
        pulse = Pulse(folder, World(), begin(folder, World()), 2.0)
        while not pulse._was_newest:
            pulse.moved()
            time.sleep(0.05)
        print(begin(folder, World()), flush=True)
        while True:
            pulse.moved()
            time.sleep(0.05)
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], timeout=120, check=False, capture_output=True)
    assert ended.returncode == -9
    assert len(ended.stdout.split()) == 1
    (row,) = incidents.read(tmp_path)
    assert row["now"] == "rank 0 of an earlier start lived yet and has ended itself"
