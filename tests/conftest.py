"""What every test shares: one thread, so that two-core machines are not oversubscribed, and the real data's folder."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, labels and weights beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the real images, labels and weights are not beside the project (../shared/data)")
    return SHARED
