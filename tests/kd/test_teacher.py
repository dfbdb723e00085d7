"""The live teacher is the detector and the alignment called by hand; the cached one hands out what came along."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_sharding.batch import Batch, Geometry, StoredTaps, Taps
from data_sharding.codecs.catalogue import TapGroup, codec, stack
from kd.blocks.align import align, check_grid
from kd.detectors.base import Detector
from kd.teacher import CachedTeacher, LiveTeacher, aligned_shapes, all_reads, only
from tests.kd import fake, runs

BOTH = frozenset({"c5", "pyramid"})


def teacher(factor: int, reads: frozenset[str] = BOTH) -> LiveTeacher:
    return LiveTeacher(runs.detector(1, width=16), runs.detector(0).shapes, factor=factor, rule="shift", reads=reads)


def by_hand(detector: Detector, images: Tensor, batch: Batch, factor: int) -> Taps:
    """Image by image, as promised on a CPU."""
    geometry = batch.geometry.scaled(factor)
    one = [Geometry(geometry.canvas, size[None]) for size in geometry.sizes]
    with torch.no_grad():
        seen = [detector.eval().features(detector.normalise(x[None], g)) for x, g in zip(images, one, strict=True)]
    aligned = [align(taps, detector.shapes, runs.detector(0).shapes, factor, "shift") for taps in seen]
    c5, *levels = (torch.cat(same) for same in zip(*map(fake.tensors, aligned), strict=True))
    return Taps(c5, tuple(levels))


def equal(a: Taps, b: Taps) -> bool:
    mine, its = fake.tensors(a), fake.tensors(b)
    return len(mine) == len(its) and all(torch.equal(x, y) for x, y in zip(mine, its, strict=True))


@pytest.mark.parametrize("factor", [1, 2])
def test_live_teacher_is_the_detector_aligned_by_hand(factor: int) -> None:
    batch, found = runs.images_of(0), teacher(factor)
    taps = found(batch)
    pixels = batch.images if factor == 1 else batch.scaled_images[2]
    assert equal(taps, by_hand(runs.detector(1, width=16), pixels, batch, factor))
    check_grid(taps, runs.detector(0).shapes, (runs.CANVAS, runs.CANVAS))
    assert not any(x.requires_grad for x in fake.tensors(taps))
    assert found.shapes.strides == runs.detector(0).shapes.strides
    assert found.shapes.pyramid_channels == taps.pyramid[0].shape[1] == 16


def test_live_teacher_is_frozen_and_learns_nothing_from_what_it_sees() -> None:
    detector = runs.detector(1, norm="batch")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    LiveTeacher(detector, detector.shapes, factor=1, rule="shift", reads=BOTH)(runs.images_of(0))
    assert runs.same(before, detector.state_dict())
    assert not detector.training
    assert not any(p.requires_grad for p in detector.parameters())


def test_students_autocast_does_not_reach_the_teacher() -> None:
    batch, found = runs.images_of(0), teacher(2)
    alone = found(batch)
    with torch.autocast("cpu", torch.bfloat16):
        inside = found(batch)
    assert equal(alone, inside)
    assert alone.pyramid[0].dtype == torch.float32


def test_the_teachers_own_bfloat16_is_its_own() -> None:
    detector, batch = runs.detector(1, width=16), runs.images_of(0)
    shapes = runs.detector(0).shapes
    taps = LiveTeacher(detector, shapes, factor=2, rule="shift", reads=BOTH, precision="bf16")(batch)
    assert taps.pyramid[0].dtype == torch.float32, (
        "what a cached teacher hands out, and what methods outside autocast take"
    )
    assert torch.equal(taps.pyramid[0].bfloat16().float(), taps.pyramid[0])
    exact = teacher(2)(batch).pyramid[0]
    assert 0 < (taps.pyramid[0].float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_teacher_sees_the_clean_pixels() -> None:
    clean = runs.images_of(0)
    jittered = replace(clean, images=255 - clean.images, scaled_images={1: clean.images})
    assert equal(teacher(1)(jittered), teacher(1)(clean))
    assert not equal(teacher(1)(replace(jittered, scaled_images={})), teacher(1)(clean))


@pytest.mark.parametrize(("reads", "count"), [(BOTH, 4), (frozenset({"c5"}), 1), (frozenset({"pyramid"}), 3)])
def test_only_what_is_read_is_kept(reads: frozenset[str], count: int) -> None:
    assert len(fake.tensors(teacher(2, reads)(runs.images_of(0)))) == count


@pytest.mark.parametrize("name", ["fp16", "fp32", "int8_channel", "int8_position"])
def test_cached_teacher_decodes_what_travels_with_the_batch(name: str) -> None:
    taps = teacher(2)(runs.images_of(0))
    assert taps.c5 is not None
    travelling = StoredTaps(stored(name, taps.c5), tuple(stored(name, x) for x in taps.pyramid))
    batch = replace(runs.images_of(0), cached={"big": travelling}).to(torch.device("cpu"))
    found = CachedTeacher("big", runs.detector(1).shapes)(batch)
    assert equal(found, travelling.decode())
    for x, y in zip(fake.tensors(found), fake.tensors(taps), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= {"fp16": 1e-3, "fp32": 0.0}.get(name, 0.02) * y.norm()
    only_pyramid = replace(batch, cached={"big": StoredTaps(None, travelling.pyramid)})
    assert CachedTeacher("big", runs.detector(1).shapes)(only_pyramid).c5 is None


def stored(name: str, x: Tensor) -> TapGroup:
    encoded = [codec(name).encode(image, level="any") for image in x]
    return stack(codec(name), encoded, (x.shape[1], x.shape[2], x.shape[3]), level="any")


def test_small_helpers() -> None:
    taps = fake.taps(1, 0)
    assert only(taps, frozenset()).pyramid == ()
    assert only(taps, frozenset()).c5 is None
    assert all_reads([]) == frozenset()
    assert all_reads([frozenset({"c5"}), frozenset({"pyramid"})]) == BOTH
    shapes = replace(fake.wider(), strides=(16, 32, 64), c5_stride=64)
    aligned = aligned_shapes(shapes, fake.SHAPES)
    assert (aligned.strides, aligned.c5_stride) == (fake.STRIDES, 32)
    assert aligned.pyramid_channels == shapes.pyramid_channels
