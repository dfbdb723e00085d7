"""The global context block: the identity at first, and its formula in loops."""

import math

import torch
from torch import nn

from kd.blocks.gcblock import GcBlock


def test_a_new_block_is_the_identity_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    block, x = GcBlock(8), torch.randn(2, 8, 3, 5)
    assert torch.equal(block(x), x)
    nn.init.normal_(block.expand.weight)
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in block.parameters())


def test_the_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = GcBlock(6).double()
    nn.init.normal_(block.expand.weight)
    nn.init.normal_(block.norm.weight)
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    cells = x[0].flatten(1).T.tolist()
    key = block.attend.weight.flatten().tolist()
    scores = [math.exp(sum(k * f for k, f in zip(key, cell, strict=True))) for cell in cells]
    context = [sum(s / sum(scores) * cell[c] for s, cell in zip(scores, cells, strict=True)) for c in range(6)]
    narrow = block.squeeze.weight.flatten(1) @ torch.tensor(context, dtype=torch.float64) + block.squeeze.get_parameter(
        "bias"
    )
    mean, variance = narrow.mean(), narrow.var(unbiased=False)
    normal = (narrow - mean) / (variance + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    added = block.expand.weight.flatten(1) @ normal.clamp(min=0) + block.expand.get_parameter("bias")
    torch.testing.assert_close(block(x), x + added.view(1, 6, 1, 1), rtol=1e-9, atol=1e-9)
