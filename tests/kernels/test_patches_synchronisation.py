"""No patched step makes the host wait for the device: the same step on tensors that have no values.

On PyTorch's ``meta`` device whatever reads a value (``item``, ``tolist``, a copy to the host, an index by a mask)
raises. Bounds and grids are on the host, where the batch was packed. Operators are called as registered, with the
shapes that they declare, as for a GPU of which this machine has none; on a GPU the same is a check of ``make gpu``.
"""

from __future__ import annotations

import pytest
import torch

from m4ov_kernels import dispatch
from m4ov_kernels.patches import patch
from tests.kernels import tiny_models as tiny

HOST = ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images", "cu_seq_lens_q")


def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "is_compiling", lambda: True)  # the registered operators, with their fakes
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(dispatch.Operator, "select", lambda *_: "the device's own")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no such device


def without_values(model, parts, family):
    batch = {**tiny.packed(model, parts), "cu_seq_lens_q": tiny.cu_seqlens(parts)}
    if family in tiny.QWEN:
        batch["position_ids"] = batch["position_ids"][1:]
    model.to("meta")
    return {name: value if name in HOST else value.to("meta") for name, value in batch.items()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_patched_step_reads_no_values(family, monkeypatch):
    model = tiny.model(family)
    patch(model)
    batch = without_values(model, tiny.mixed_samples(model), family)
    as_on_a_gpu(monkeypatch)
    model(**batch, num_valid=10, use_cache=False).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in missing if "post_layernorm" not in name] == []  # SigLIP's, whose output nobody uses


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_unpatched_step_does(family, monkeypatch):
    """The rule is one that can be broken."""
    model = tiny.model(family)
    batch = without_values(model, tiny.mixed_samples(model), family)
    del batch["cu_seq_lens_q"]
    as_on_a_gpu(monkeypatch)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"[Mm]eta"):
        model(**batch, use_cache=False)
