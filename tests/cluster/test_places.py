"""Paths of a recipe: absolute for everybody, and inside a job refused where they would be lost with it."""

from pathlib import Path

import pytest

from cluster.config import load
from cluster.grammar import ConfigError
from cluster.places import JOB, anchored


def test_without_relative_paths_nothing_changes(tmp_path: Path) -> None:
    config = load("digits_student", {"storage": str(tmp_path)})
    assert anchored(config) is config


def test_relative_paths_mean_the_folder_that_the_command_was_typed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "teachers.0.weights": "big/student",
        "data.train.images": "images",
        "data.train.annotations": "/elsewhere/train.json",
        "data.val.images": "images",
        "data.val.annotations": "val.json",
        "student.backbone.weights": "mobilenet.pth",
        "tracking.uri": "sqlite:///record.db",
    }
    config = anchored(load("hit_uav_pkd", settings))
    assert config.storage == str(tmp_path / "runs")
    assert config.teachers[0].weights == tmp_path / "big" / "student"
    assert config.data.train.images == tmp_path / "images"
    assert config.data.train.annotations == Path("/elsewhere/train.json")
    assert config.student.backbone.weights == str(tmp_path / "mobilenet.pth")
    assert config.tracking.uri == f"sqlite:///{tmp_path / 'record.db'}"
    assert anchored(config) is config


def test_a_server_or_an_absolute_database_stays_what_it_is() -> None:
    for uri in ("http://127.0.0.1:5000", "sqlite:////shared/record.db"):
        config = load("digits_student", {"storage": "/shared", "tracking.uri": uri})
        assert anchored(config) is config


def test_inside_a_job_every_relative_path_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB, "{}")
    config = load("digits_scalekd", {"teachers.0.weights": "runs/digits_teacher/student"})
    with pytest.raises(ConfigError, match="inside a job every path must be absolute") as told:
        anchored(config)
    assert "storage=runs" in str(told.value)
    assert "teachers.0.weights=runs/digits_teacher/student" in str(told.value)
    whole = load("digits_scalekd", {"teachers.0.weights": "/shared/student", "storage": "/shared"})
    assert anchored(whole) is whole


def test_storage_that_is_no_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a folder that all machines share, got s3://"):
        anchored(load("digits_student", {"storage": "s3://bucket/runs"}))
