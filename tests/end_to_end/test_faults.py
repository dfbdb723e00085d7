"""Whatever dies, the same command ends in the same weights, and no metric is lost or doubled (`make test-faults`).

MINNOW_FAULT_DRAWS is the number of draws of each fault, 1 unless it is set; `python -m benchmarks.faults` does ten and
writes their table."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_cluster import Standing

DRAWS = int(os.environ.get("MINNOW_FAULT_DRAWS", "1"))
ONLY = os.environ.get("MINNOW_FAULTS", ",".join(faults.FAULTS)).split(",")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    with closing(Standing()) as cluster:
        yield cluster


@pytest.mark.faults
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("fault", ONLY)
def test_a_fault_changes_nothing(fault: str, number: int, storage: Path, standing: Standing) -> None:
    found = faults.draw(fault, number, storage, standing)
    if "not_permitted" in found:
        pytest.skip(f"not permitted on this machine: {found['not_permitted']}")
    assert found.get("good"), found
