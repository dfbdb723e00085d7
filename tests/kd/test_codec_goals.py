"""What int8 and sparse caches must reach: bytes on synthetic boxes, errors on what a trained net sees of images."""

from pathlib import Path

import pytest
import torch
from torchvision.models import mobilenet_v2

from benchmarks.cache_codecs import GRADIENT_GOAL, LOSS_GOAL, SHARES, Maps, errors, sizes
from tests.kd.students import photographs

STAGES = {"p3": 6, "p4": 13, "c5": 17}
"""After which of MobileNetV2's blocks."""


@pytest.mark.parametrize("row", list(sizes()), ids=lambda row: f"{row['foreground']:.0%}")
def test_bytes_against_dense_fp16(row: dict[str, dict[str, float]]) -> None:
    """Scales, masks and Arrow's headers counted."""
    found = row["bytes"]
    assert found["int8_channel"] <= 0.501
    assert found["int8_position"] <= 0.505
    assert max(found["sparse_channel"], found["sparse_position"]) <= SHARES[float(row["foreground"])]  # type: ignore[arg-type]


@torch.no_grad()
def seen(shared_data: Path, images: int) -> list[Maps]:
    """ImageNet's MobileNetV2 on real images, with a band across the middle as foreground."""
    net = mobilenet_v2().eval()
    net.load_state_dict(torch.load(shared_data / "weights/mobilenet_v2-b0353104.pth", weights_only=True))
    found: list[Maps] = []
    for image in photographs(shared_data, images):
        x, maps = image[None].float() / 127.5 - 1, {}
        for number, block in enumerate(net.features):
            x = block(x)
            name = next((n for n, at in STAGES.items() if at == number), None)
            if name is not None:
                mask = torch.zeros(x.shape[2:], dtype=torch.bool)
                mask[x.shape[2] // 3 : x.shape[2] // 2] = True
                maps[name] = (x[0], mask)
        found.append(maps)
    return found


def test_errors_of_losses_on_real_features(shared_data: Path) -> None:
    """Of a student at relative distance 0.3, with the codec that is chosen for each tap."""
    found = errors(seen(shared_data, 2))
    chosen = {(tap, name) for choice in found["choices"].values() for tap, name in choice.items()}
    assert len(chosen) == 2 * len(STAGES)
    for row in found["errors"]:
        if (row["tap"], row["codec"]) in chosen:
            assert row["l2"] <= 0.01, row
            assert row["mse 0.3"] <= LOSS_GOAL, row
            assert row["cwd 0.3"] <= 0.005, row
            assert row["mse gradient 0.3"] <= GRADIENT_GOAL, row
