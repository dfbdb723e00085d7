"""What holds for every method in the folder inside a whole step: student, live or cached teacher, head, assistant."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_sharding.batch import Batch, StoredTaps
from data_sharding.codecs.catalogue import TapGroup, codec, stack
from data_sharding.world import World
from kd import student as student_files
from kd.methods.base import Assistant, Method
from kd.plugins import plugin
from kd.step import StepReport, train_step
from kd.teacher import CachedTeacher, LiveTeacher, only
from tests.kd import fake, runs
from tests.kd.detecting import DETECTORS

METHODS = runs.every_method()
every_method = pytest.mark.parametrize("name", METHODS)


@cache
def run_of(name: str) -> runs.Run:
    """A run of the method with the first detector that it goes with."""
    refused: list[str] = []
    for detector in DETECTORS:
        run = runs.Run(detector=detector, distill={name: METHODS[name]}, steps=2)
        try:
            runs.build(run, World())
        except ValueError as error:
            refused.append(f"{detector}: {error}")
        else:
            return run
    raise AssertionError(f"{name} goes with no detector: {refused}")


def build(name: str) -> runs.Parts:
    return runs.build(run_of(name), World())


def step(parts: runs.Parts, batch: Batch, cached: StoredTaps | None = None) -> StepReport:
    """One optimizer step, from the live teacher or from taps that travel with the batch."""
    live = parts.teachers["big"]
    assert isinstance(live, LiveTeacher)
    teachers = {"big": live if cached is None else CachedTeacher("big", live.shapes)}
    given = batch if cached is None else replace(batch, cached={"big": cached})
    return train_step(parts.engine, [given], teachers, parts.assistants, runs.ADAMW, 0, World(), parts.clock)


def stored(x: Tensor) -> TapGroup:
    """(B, C, h, w) as the bytes of an fp32 cache."""
    dense = codec("fp32")
    encoded = [dense.encode(one, level="p") for one in x]
    return stack(dense, encoded, (x.shape[1], x.shape[2], x.shape[3]), level="p")


@every_method
def test_a_cache_of_the_declared_taps_teaches_what_the_live_teacher_teaches(name: str) -> None:
    """To the bit: every term, and the student after the step."""
    live, cached = build(name), build(name)
    batch, teacher = runs.images_of(0), live.teachers["big"]
    taps = only(teacher(batch), plugin("kd.methods", name).Loss.reads)
    kept = StoredTaps(None if taps.c5 is None else stored(taps.c5), tuple(stored(x) for x in taps.pyramid))
    assert step(cached, batch, kept).losses == step(live, batch).losses
    assert runs.same(cached.engine.student_state(), live.engine.student_state())
    assert torch.equal(runs.weights(cached.assistants), runs.weights(live.assistants))


@every_method
def test_what_it_learns_is_saved_and_the_student_leaves_without_it(name: str, tmp_path: Path) -> None:
    first, second = build(name), build(name)
    first.do(0)
    first.engine.save(tmp_path)
    second.engine.load(tmp_path)
    for mine, its in zip(first.assistants.values(), second.assistants.values(), strict=True):
        its.load_state_dict(mine.state_dict())
    assert runs.same(second.engine.distiller.state_dict(), first.engine.distiller.state_dict())
    # Where tensors lie in memory decides the last bit, and a divergence of equal outputs is made of last bits.
    assert second.do(1).losses == pytest.approx(first.do(1).losses, rel=1e-4, abs=1e-6)

    run = run_of(name)
    alone, untaught = (runs.detector(0, name=run.detector, **run.head) for _ in range(2))
    assert first.engine.student_state().keys() == alone.state_dict().keys()
    alone.load_state_dict(first.engine.student_state())
    assert student_files.weights_hash(alone) != student_files.weights_hash(untaught)


@every_method
def test_the_teacher_is_in_no_optimizer_and_no_checkpoint(name: str) -> None:
    parts = build(name)
    live, trained = parts.teachers["big"], {id(p) for p in parts.engine.distiller.parameters()}
    assert isinstance(live, LiveTeacher)
    before = {key: value.clone() for key, value in live.detector.state_dict().items()}
    trained |= {id(p) for trainer in parts.assistants.values() for p in trainer.assistant.parameters()}
    assert not trained & {id(p) for p in live.detector.parameters()}
    parts.do(0)
    assert runs.same(live.detector.state_dict(), before)
    assert all(p.grad is None for p in live.detector.parameters())


@every_method
def test_chance_is_keyed_and_never_the_global_generators(name: str) -> None:
    losses = []
    for seed in (1, 2):
        parts = build(name)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(parts.do(0).losses)
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]


def made(name: str) -> tuple[Method, Assistant | None]:
    """The method, and its assistant where it has one, for hand-made taps."""
    module = plugin("kd.methods", name)
    assistant = module.Assistant(METHODS[name], fake.pair()) if hasattr(module, "Assistant") else None
    return module.Loss(METHODS[name], fake.pair()), assistant


@every_method
def test_taps_stay_as_they_were(name: str) -> None:
    method, assistant = made(name)
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    copies = [x.clone() for x in (*fake.tensors(student), *fake.tensors(teacher))]
    fake.run(method, student, teacher, fake.batch(2), assistant=assistant)
    assert all(torch.equal(a, b) for a, b in zip((*fake.tensors(student), *fake.tensors(teacher)), copies, strict=True))


class Counted(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@every_method
def test_no_loop_over_boxes(name: str) -> None:
    """Twenty boxes an image are as many calls as two."""
    (method, assistant), found = made(name), []
    student, teacher = fake.taps(2, 1), fake.taps(2, 2)
    for copies in (1, 10):
        batch = fake.batch(2)
        many = tuple(boxes.repeat(copies, 1) for boxes in batch.boxes)
        labels = tuple(labels.repeat(copies) for labels in batch.labels)
        counted, batch = Counted(), fake.with_boxes(batch, many, labels)
        with counted:
            fake.run(method, student, teacher, batch, assistant=assistant)
        found.append(counted.calls)
    assert found[0] == found[1]
