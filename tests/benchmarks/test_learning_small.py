"""What `benchmarks.learning_check` asks of every method, in small, of two of them: on real images, the method's own
loss falls, and hardly any of that is left on other images when the teacher's taps change places."""

from pathlib import Path

import pytest

from benchmarks.classroom import built, every_method
from benchmarks.learning import check
from benchmarks.lecture import CPU, hit_uav, lecture, pupil, real_batches
from kd.backbones import mobilenetv2
from kd.detectors import fcos


@pytest.mark.parametrize("name", ["fitnet", "pkd"])
def test_a_method_teaches_what_the_teacher_sees_of_each_image(name: str, shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenet_v2-b0353104.pth"
    # An untrained neck on ImageNet's backbone: it has seen no task, but each image differs to it.
    backbone = mobilenetv2.Config(norm="frozen", weights=str(weights))
    config = fcos.Config(backbone=backbone, width=32, head_depth=1, levels=(4, 5, 6))
    teacher, student = built(config, 4, CPU, seed=1).eval().requires_grad_(False), pupil(config, weights)
    data = hit_uav(shared_data / "hit_uav")
    lectures = [lecture(student, teacher, real_batches(data, split, 4)) for split in ("train", "val")]
    found = check(name, every_method()[name], student, teacher, *lectures, settle=20, steps=60)
    assert found.verdict == "passes", f"fall {found.fall:.0%}, the shuffle removes {found.removed:.0%}"
