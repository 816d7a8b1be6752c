"""``integrations.transformer_engine``: which layers it takes, and what it says where it cannot; on a GPU with the
package, a step of training."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from m4ov_kernels.integrations import transformer_engine

HERE = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(64, 128), "odd": nn.Linear(128, 60)}) for _ in "ab")
        self.down = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 128)


def test_the_layers_it_takes():
    assert transformer_engine.eligible(Tower()) == ["blocks.0.up", "blocks.1.up", "down"]
    kept = transformer_engine.eligible(Tower(), keep=[r"blocks\..*", "dow"])
    assert kept == ["down", "lm_head"]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="transformer-engine is there")
def test_without_the_package_it_says_so():
    model = Tower()
    for call in (
        lambda: transformer_engine.install(model),
        lambda: transformer_engine.remove(model),
        transformer_engine.autocast,
    ):
        with pytest.raises(RuntimeError, match="transformer-engine is not installed"):
            call()
    assert all(type(m) is nn.Linear for m in (model.down, model.blocks[0]["up"]))


@pytest.mark.skipif(not HERE, reason="needs a CUDA device and transformer-engine")
def test_a_step_of_training_on_a_gpu():
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to("cuda", torch.bfloat16)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    plain, parameters = model(x), list(model.parameters())
    assert transformer_engine.install(model) == ["0", "2"]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    with transformer_engine.autocast():
        found = model(x)
    assert ((found - plain).float().norm() / plain.float().norm()) < 0.1
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters)
    assert transformer_engine.remove(model) == ["0", "2"]
    assert torch.equal(model(x), plain)
