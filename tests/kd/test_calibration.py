"""A method that is asked for a share of the task's loss gets it, and goes on with the same scale after a restart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_sharding.world import World
from kd.calibration import Calibration
from kd.methods import fitnet
from tests.kd import runs

RUN = runs.Run(distill={"fitnet": fitnet.Config(share=0.2, share_steps=2)}, optim=runs.SGD, steps=4)


def test_nothing_is_scaled_before_anything_is_measured() -> None:
    calibration = Calibration(0.1, steps=3)
    assert calibration.scale() == 0
    calibration.see(4.0, 0.0)  # no image had a box
    calibration.see(0.0, 4.0)
    assert calibration.scale() == 0


def test_the_scale_is_that_of_the_first_steps_and_stays() -> None:
    calibration = Calibration(0.1, steps=2)
    for task, own, scale in ((4.0, 80.0, 0.005), (2.0, 40.0, 0.005), (2.0, 1.0, 0.005)):
        calibration.see(task, own)
        assert calibration.scale().item() == pytest.approx(scale)
    calibration = Calibration(0.1, steps=2)
    calibration.see(4.0, 80.0)
    calibration.see(4.0, 40.0)
    assert calibration.scale().item() == pytest.approx(0.1 * 8 / 120)


def test_a_run_measures_one_step_and_then_learns_at_its_share() -> None:
    parts = runs.build(RUN, World())
    reports = [parts.do(step) for step in range(4)]
    task = [sum(v for n, v in report.losses.items() if n.startswith("task/")) for report in reports]
    raw, own = ([report.losses[name] for report in reports] for name in ("raw/fitnet", "kd/fitnet/feat"))
    assert own[0] == 0
    assert own[1] == pytest.approx(0.2 * task[0] / raw[0] * raw[1], rel=1e-5)
    scale = 0.2 * (task[0] + task[1]) / (raw[0] + raw[1])
    assert [x / y for x, y in zip(own[2:], raw[2:], strict=True)] == pytest.approx([scale, scale], rel=1e-5)
    metrics = reports[2].metrics()
    assert metrics["scale/fitnet"] == pytest.approx(scale, rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(task[2] + own[2], rel=1e-5)


def test_the_first_step_is_the_plain_students() -> None:
    taught, plain = (runs.train(World(), replace(RUN, distill=d, steps=1)) for d in (RUN.distill, {}))
    assert runs.same(taught.states[-1], plain.states[-1])


def test_accumulation_measures_the_same() -> None:
    whole, parts = (
        runs.train(World(), replace(RUN, optim=replace(RUN.optim, accumulate=n, lr=1e-3), steps=3)) for n in (1, 2)
    )
    assert runs.gap(whole, parts) < 1e-4


def test_the_scale_comes_back_with_the_run(tmp_path: Path) -> None:
    first, second = runs.build(RUN, World()), runs.build(RUN, World())
    first.do(0)
    first.engine.save(tmp_path)
    second.engine.load(tmp_path)
    assert torch.equal(*(p.engine.distiller.calibrations["fitnet"].seen for p in (first, second)))  # pyright: ignore
    assert second.do(1).losses == pytest.approx(first.do(1).losses, rel=1e-5)
    assert "seen" not in " ".join(first.engine.student_state())


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": -1.0}, {"share_steps": 0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fitnet.Config(**wrong)  # pyright: ignore[reportArgumentType]
