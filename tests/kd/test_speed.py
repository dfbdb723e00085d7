import pytest
import torch

from kd.backbones import mobilenetv2
from kd.detectors import fcos
from kd.evaluation.speed import measure


def tiny(levels: tuple[int, ...]) -> fcos.FCOS:
    config = fcos.Config(width=16, head_depth=1, levels=levels, backbone=mobilenetv2.Config(width_mult=0.1))
    return fcos.build(config, 2)


def test_a_detector_with_p2_costs_more_and_its_mode_is_given_back() -> None:
    coarse, fine = tiny((3, 4)).train(), tiny((2, 3, 4)).train()
    small, large = measure(coarse, (64, 64), repeats=3), measure(fine, (64, 64), repeats=3)
    assert small.parameters == sum(p.numel() for p in coarse.parameters()) < large.parameters
    assert 0 < small.gflops < large.gflops
    assert small.milliseconds > 0
    assert coarse.training
    assert all(m.training for m in coarse.modules())


def test_gflops_grow_with_the_canvas() -> None:
    detector = tiny((3, 4))
    assert measure(detector, (128, 128), repeats=1).gflops == pytest.approx(
        4 * measure(detector, (64, 64), repeats=1).gflops, rel=0.01
    )


def test_no_repeats_are_refused() -> None:
    with torch.device("meta"):
        detector = tiny((3, 4))
    with pytest.raises(ValueError, match="repeats"):
        measure(detector, (64, 64), repeats=0)
