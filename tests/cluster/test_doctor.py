"""The doctor finds nothing in a sound recipe, and every planted fault with the setting that mends it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cluster import doctor
from cluster.checkup import data as checkup_data
from cluster.checkup import losses as checkup_losses
from cluster.checkup import machine as checkup_machine
from cluster.checkup import sizes as checkup_sizes
from cluster.checkup.findings import Finding, close
from cluster.config import RunConfig, load
from data_sharding.datasets import digits
from data_sharding.record import Category
from kd import student
from kd.backbones.mobilenetv2 import Config as MobileNet
from kd.detectors import fcos
from kd.methods.base import MethodConfig
from tests.cluster.test_scoring import SMALL
from tests.end_to_end.commands import save_teacher

HEALTHY = {
    "distill": {"pkd": {"alpha": 0.6}},
    "teachers.0.min_ap": 0.0,
    "optim.batch": 4,
    "optim.steps": 12,
    "optim.warmup": 1,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def disk_of(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(total=total, used=total - free, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.fixture
def recipe(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    disk_of(monkeypatch, total=100 * 2**30, free=50 * 2**30)  # whatever the machine of the tests has left

    def make(**more: Any) -> RunConfig:
        places = {"storage": str(tmp_path / "runs"), "teachers.0.weights": str(teacher)}
        return load("digits_scalekd", SMALL | HEALTHY | places | more)

    return make


def advice(capsys: pytest.CaptureFixture[str]) -> str:
    """The closing list."""
    return capsys.readouterr().out.partition("What to change\n")[2]


def test_a_sound_recipe_has_nothing_that_must_change(
    recipe: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.act(recipe()) == 0
    told = capsys.readouterr().out
    for area in ("machine", "labels", "sizes", "teachers", "losses", "memory", "disks"):
        assert f"\n{area}" in f"\n{told}", area
    assert "pkd/feat" in told
    assert "FAIL" not in told
    assert "sight of teacher" in told.partition("What to change")[0]
    assert "sight of teacher" not in told.partition("What to change")[2]
    assert not (tmp_path / "runs").exists(), "the doctor leaves nothing behind"


def test_without_methods_the_student_alone_is_tried(
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.act(replace(recipe(), distill={}, teachers=())) == 0
    assert "step of student" in capsys.readouterr().out


def test_a_full_disk(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_of(monkeypatch, total=2_000_000, free=1_000_000)
    assert doctor.act(recipe()) == 1
    assert "must: disk space" in advice(capsys)


def test_a_teacher_of_other_classes(
    recipe: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = fcos.Config(backbone=MobileNet(width_mult=0.25, norm="group"), width=32, head_depth=1, levels=(3, 4, 5))
    names = tuple(Category(c.id, f"digit {c.name}") for c in digits.categories(digits.Config()))
    other = student.save(fcos.build(settings, 10), settings, names, tmp_path / "other")
    assert doctor.act(recipe(**{"teachers.0.weights": str(other)})) == 1
    told = advice(capsys)
    assert "must: teacher teacher" in told
    assert "0: data set '0', teacher 'digit 0'" in told


def test_a_teacher_that_sees_the_same_in_every_image(
    recipe: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = fcos.Config(backbone=MobileNet(width_mult=0.25, norm="group"), width=32, head_depth=1, levels=(3, 4, 5))
    blind = fcos.build(settings, 10)
    with torch.no_grad():
        for convolution in (module for module in blind.fpn.modules() if isinstance(module, torch.nn.Conv2d)):
            convolution.weight.zero_()
            assert convolution.bias is not None
            convolution.bias.fill_(3.0)
    weights = student.save(blind, settings, digits.categories(digits.Config()), tmp_path / "blind")
    assert doctor.act(recipe(**{"teachers.0.weights": str(weights)})) == 0, "a warning does not fail"
    assert "should: sight of teacher: P3 and P4 and P5 of this teacher" in advice(capsys)


def test_missing_weights(recipe: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.act(recipe(**{"teachers.0.weights": str(tmp_path / "nowhere")})) == 1
    assert "point teachers.0.weights at the `student` folder" in advice(capsys)


def test_a_method_that_dominates(recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.act(recipe(distill={"pkd": {"alpha": 0.6, "weight": 1000.0}})) == 0, "a warning does not fail"
    told = advice(capsys)
    assert "should: weight of pkd/feat: dominates" in told
    weight = float(told.partition("distill.pkd.weight=")[2].split()[0])
    doctor.act(recipe(distill={"pkd": {"alpha": 0.6, "weight": weight}}))
    assert "weight of pkd" not in capsys.readouterr().out.partition("What to change\n")[2]


def test_a_calibrated_method_has_the_share_that_it_asks_for(
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.act(recipe(distill={"pkd": {"share": 0.6, "share_steps": 2}}))
    told = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("│")] for line in told.splitlines()]
    (row,) = [cells for cells in table if cells[1:2] == ["pkd/feat"]]
    share, pull = (float(cell.rstrip("%")) for cell in row[3:5])
    assert share == pytest.approx(60, abs=2)
    assert pull > 1, "its gradient at the pyramid"
    assert "distill.pkd.share=0.15" in told.partition("What to change\n")[2]


def test_data_that_cannot_be_read(recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe()
    assert doctor.act(replace(config, data=replace(config.data, val=0))) == 1
    assert "must: data: data set digits has no images in split 'val'" in advice(capsys)


def test_a_step_that_breaks(recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.act(recipe(**{"optim.accumulate": 2})) == 1
    assert "set pkd.statistics to image" in advice(capsys)


def test_the_setting_of_one_term_among_several_is_found_by_trying(
    recipe: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alpha` scales `feat` alone, `weight` scales all three terms."""
    config = recipe(distill={"scalekd": {"alpha": 2.0, "sdf": {"width": 16, "token_width": 16}, "csa": {"heads": 2}}})
    terms = {"kd/scalekd/feat": 3.0, "kd/scalekd/cls": 0.5, "kd/scalekd/box": 0.1}

    def terms_with(bench: object, name: str, settings: MethodConfig) -> dict[str, float]:
        del bench, name
        found: Any = settings
        return terms | {
            "kd/scalekd/feat": 1.5 * found.alpha,
            "kd/scalekd/cls": 2.5 * (0.2 if found.beta is None else found.beta),
        }

    monkeypatch.setattr(checkup_losses, "terms_with", terms_with)

    class Bench(NamedTuple):
        config: RunConfig

    def found(term: str) -> str | None:
        bench: Any = Bench(config)
        return checkup_losses._setting(bench, "scalekd", f"kd/scalekd/{term}", terms, terms[f"kd/scalekd/{term}"])

    assert found("feat") == "distill.scalekd.alpha=0.1"  # 2.0 makes 3.0 of a task of 1.0: 0.15 needs a twentieth
    assert found("cls") == "distill.scalekd.beta=0.06"
    assert found("box") is None


@pytest.mark.parametrize(
    ("share", "assisted", "word"),
    [(0.0, False, "weak"), (0.0, True, "begins later"), (0.04, True, "weak"), (0.15, False, "fine"),
     (0.3, False, "fine"), (0.31, False, "dominates")],
)  # fmt: skip
def test_verdicts_on_shares(share: float, assisted: bool, word: str) -> None:
    assert checkup_losses.judged(share, assisted) == word


@pytest.mark.parametrize(
    ("settings", "steps", "step"),
    [({}, 100, 0), ({"start": 1 / 3}, 90, 30), ({"start": 0.5, "ramp": 0.25}, 100, 75), ({"stop": 0.5}, 10, 0),
     ({"start": 0.9, "ramp": 0.5}, 10, 9), ({"start": 0.2, "ramp": 0.6, "stop": 0.5}, 10, 4)],
)  # fmt: skip
def test_a_method_is_tried_at_its_strongest(settings: dict[str, float], steps: int, step: int) -> None:
    config = MethodConfig(**settings)
    assert config.fullest(steps) == step
    assert config.strength(step / steps) == max(config.strength(i / steps) for i in range(steps))


def seen(count: int, edge: float, *, digest: int = 0, label: int = 0) -> checkup_data.Seen:
    boxes = np.tile(np.array([[10, 10, 10 + edge, 10 + edge]], np.float32), (count, 1))
    return checkup_data.Seen(
        name="x.png", image_id=digest, width=128, height=128, boxes=boxes, labels=np.full(count, label, np.int64),
        areas=np.full(count, edge**2, np.float32), digest=digest, bytes=1,
    )  # fmt: skip


def labels_of(train: list[checkup_data.Seen], val: list[checkup_data.Seen]) -> checkup_data.Labels:
    class Source(NamedTuple):
        count: int

    sources: Any = {"train": Source(len(train)), "val": Source(len(val))}
    classes = (Category(1, "left"), Category(2, "right"))
    return checkup_data.Labels(module=None, sources=sources, categories=classes, seen={"train": train, "val": val})


def told(findings: list[Finding] | tuple[Finding, ...] | Any, check: str) -> Finding:
    return next(f for f in findings if f.check == check)


def test_crowds_small_boxes_and_shared_images_are_told_with_settings(recipe: Callable[..., RunConfig]) -> None:
    config = recipe(**{"teachers.0.factor": 1})
    data = labels_of([seen(250, 3, digest=1), seen(20, 40, digest=2)], [seen(5, 9, digest=1, label=1)])
    found = [*checkup_data.examine(config, data).findings, *checkup_sizes.examine(config, data, (8, 16, 32)).findings]
    assert "evaluation.max_dets=[1,10,300] student.detections=300" in str(told(found, "crowds").change)
    assert "student.levels=[2, 3, 4, 5]" in str(told(found, "finest level").change)
    assert "1 of val are in train too" in told(found, "images in both splits").found
    assert "none in train: right" in told(found, "classes").found
    assert all(f.verdict in ("ok", "warn") for f in found)


def test_a_canvas_that_is_mostly_padding_gets_another(recipe: Callable[..., RunConfig]) -> None:
    config = recipe(**{"views.buckets": [[128, 256]]})
    found = checkup_sizes.examine(config, labels_of([seen(1, 20)], [seen(1, 20)]), (4,)).findings
    assert "views.buckets=[[128,128]]" in str(told(found, "canvases").change)


def test_workers_that_no_machine_holds(recipe: Callable[..., RunConfig]) -> None:
    many = {"resources.workers": 64, "optim.batch": 64}
    findings = checkup_machine._enough(recipe(**many), 8, 0, "this machine")
    assert findings[0].verdict == "FAIL"
    assert "resources.workers=8 resources.threads=1" in str(findings[0].change)
    assert "resources.gpu=null" in str(checkup_machine._enough(recipe(**{"resources.gpu": True}), 8, 0, "x")[1].change)


def test_other_versions_than_the_locked_ones(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"torch=={torch.__version__.partition('+')[0]}\nnumpy==0.0.1\nno-such-package==1\n")
    found = checkup_machine._packages(lock)
    assert found.verdict == "warn"
    assert "(locked 0.0.1)" in found.found
    assert "no-such-package is not installed" in found.found
    lock.write_text("torch==0\nray-of-light==1\n")
    assert checkup_machine._packages(lock).verdict == "warn"


def test_the_exit_code_follows_what_would_break(capsys: pytest.CaptureFixture[str]) -> None:
    fine, poor = Finding(check="a", found="b"), Finding(check="c", found="d", verdict="warn", change="e")
    assert close([]) == 0
    assert close([fine]) == 0
    assert "Nothing to change" in capsys.readouterr().out
    assert close([poor]) == 0
    assert close([poor, replace(poor, verdict="FAIL")]) == 1
    assert capsys.readouterr().out.splitlines()[-3].strip() == "1. must: c: e"


def test_help_answers_without_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.doctor", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "python -m cluster.doctor digits_student" in done.stdout
