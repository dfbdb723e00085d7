"""The measures of the methods' benchmarks measure what they say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import methods, mutations
from benchmarks.learning import Found


def test_what_autograd_holds_is_counted_once_and_let_go() -> None:
    x = torch.ones(1000, requires_grad=True)
    with methods.saved() as meter:
        y = (x * x).exp().sum()  # saves x twice, and exp's result
        assert meter.peak == 2 * 4000
        y.backward()
        z = (2 * x).exp().sum()
        assert z.item() > 0
    assert meter.peak == 2 * 4000, "the first graph was let go before the second was made"
    del y, z
    assert meter._now == 0


def test_a_table_of_costs_is_paired_within_rounds() -> None:
    content = {
        "device": "cpu", "torch": "2", "side": 128, "batch": 8, "refused": {"ld": "no bins"},
        "rounds": [{"plain": 1.0, "a": 1.5}, {"plain": 2.0, "a": 2.8}, {"plain": 4.0, "a": 6.0}],
        "bytes": {"plain": 10_000_000, "a": 12_000_000}, "parameters": {"plain": 0, "a": 1_000_000},
    }  # fmt: skip
    table = "\n".join(methods.report(content))
    assert "a                    +50%           +40% .. +50%       +2.0 MB    16.0 MB" in table
    assert "ld             does not go with this pair: no bins" in table


def found(**changes: float) -> Found:
    numbers = {"new": 20.0, "learnt": 9.0, "before": 10.0, "after": 8.0}
    numbers |= {"held_out_before": 10.0, "held_out_after": 6.0, "held_out_shuffled": 9.0}
    terms = {name: {"feat": value - 1, "cls": 1.0} for name, value in (numbers | changes).items()}
    return Found(seconds=1.0, **terms)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "passes"),
        ({"learnt": 10.1}, "does not learn"),
        ({"held_out_shuffled": 7.9}, "does not see the images"),
        ({"held_out_after": 10.5}, "does not see the images"),
    ],
)
def test_verdicts_of_the_learning_check(changes: dict[str, float], verdict: str) -> None:
    assert found(**changes).verdict == verdict


def test_every_method_has_mutations_of_text_that_is_there_once() -> None:
    """`python -m benchmarks.mutations` runs them: a minute or two."""
    for mutation in mutations.mutations():
        path = mutations.ROOT / "kd" / "methods" / f"{mutation.method}.py"
        assert mutation.applied(path.read_text()) != path.read_text()
    with pytest.raises(ValueError, match="there 0 times"):
        replace(mutation, old="nothing of the kind").applied(path.read_text())
