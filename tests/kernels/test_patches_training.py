"""How a patched model trains: convergence, checkpointing, LoRA, frozen halves, ``torch.compile``, ``fully_shard``."""

from __future__ import annotations

import copy
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from m4ov.parallel.ranks import PRELOAD
from m4ov_kernels.patches import patch, unpatch
from tests.kernels import tiny_models as tiny
from tests.kernels.steps import assert_same, assert_same_step, in_float64, logits_of, step

FAMILIES = pytest.mark.parametrize("family", tiny.FAMILIES)


def pair(family="qwen3_vl", **options):
    plain = tiny.model(family, **{"layers": 2, **options})
    patched = copy.deepcopy(plain)
    patch(patched)
    return plain, patched


# Of Qwen3-VL-MoE every replaced part is Qwen3-VL's, and which expert a token goes to hangs on the last bit.
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "llava_onevision"])
def test_two_hundred_steps_go_the_same_way(family):
    one = {"num_hidden_layers": 1} if family == "llava_onevision" else {"depth": 1}
    plain, patched = pair(family, layers=1, vision=one)
    batches = [tiny.packed(plain, [tiny.sample(plain, 8), tiny.sample(plain, 5, [])]) for _ in range(2)]
    curves = [_losses(model, batches) for model in (plain, patched)]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)
    assert float(curves[0][-4:].mean()) < 0.5 * float(curves[0][:4].mean())  # it learned


def _losses(model, batches) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)
    losses = []
    for index in range(200):
        loss = model(**batches[index % len(batches)], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("reentrant", [False, True])
@FAMILIES
def test_gradient_checkpointing(family, reentrant):
    plain, patched = pair(family)
    batch = tiny.packed(plain, tiny.samples(plain))
    expected = step(plain, batch, use_cache=False)
    calls = []
    patched.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    assert_same_step(step(patched, batch), expected, in_float64(plain, batch, use_cache=False))
    assert len(calls) == 2  # once more in the backward


@FAMILIES
def test_lora(family):
    """On every linear layer of both halves, the head too; put on before the patch and after it."""
    peft = pytest.importorskip("peft")
    plain = tiny.model(family)
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=None, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():  # adapters larger than what they adapt would make a model of rounding errors
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    before = copy.deepcopy(adapted)
    patch(before)
    after = copy.deepcopy(plain)
    patch(after)
    after = peft.get_peft_model(after, config)
    after.load_state_dict(adapted.state_dict())
    batch = tiny.packed(plain, tiny.samples(plain))
    expected = step(adapted, batch, use_cache=False)
    assert all("lora_" in name for name in expected[1])
    for model in (before, after):
        exact = in_float64(adapted, batch, use_cache=False)
        assert_same_step(step(model, batch, use_cache=False), expected, exact)
    merged = before.merge_and_unload()
    assert_same(logits_of(merged, batch, use_cache=False), logits_of(adapted, batch, use_cache=False))


@pytest.mark.parametrize("frozen", ["vision", "text", "all but the projector"])
@FAMILIES
def test_frozen_halves_stay_frozen(family, frozen):
    """Nothing in a frozen vision tower records a gradient; in a frozen language model no weight gets one."""
    plain, _ = pair(family)
    tower = plain.model.vision_tower if family == "llava_onevision" else plain.model.visual
    projector = plain.model.multi_modal_projector if family == "llava_onevision" else tower.merger
    if frozen == "vision":
        tower.requires_grad_(False)
    elif frozen == "text":
        plain.model.language_model.requires_grad_(False)
        plain.lm_head.requires_grad_(False)
    else:
        plain.requires_grad_(False)
        projector.requires_grad_(True)
    patched = copy.deepcopy(plain)
    patch(patched)
    recorded = []
    ours = patched.model.vision_tower if family == "llava_onevision" else patched.model.visual
    for name, module in ours.named_modules():
        if not name.startswith("merger") and name:
            module.register_forward_hook(
                lambda module, args, output, name=name: (
                    recorded.append(name) if isinstance(output, torch.Tensor) and output.requires_grad else None
                )
            )
    batch = tiny.packed(plain, tiny.samples(plain))
    options = {"use_cache": False}
    expected = step(plain, batch, **options)
    assert_same_step(step(patched, batch, **options), expected, in_float64(plain, batch, **options))
    if frozen != "text":
        assert recorded == []
    assert {name for name, value in patched.named_parameters() if value.grad is not None} == {
        name for name, value in plain.named_parameters() if value.grad is not None
    }


@FAMILIES
def test_torch_compile_of_text(family):
    """In packed rows. (With images transformers itself breaks the graph a dozen times: a minute of compiling.)"""
    plain, patched = pair(family, layers=1, **({"mlp_only_layers": []} if family == "qwen3_vl_moe" else {}))
    parts = [tiny.sample(plain, 9, []), tiny.sample(plain, 14, [])]
    batch = tiny.packed(plain, parts)
    compiled = torch.compile(patched, backend="aot_eager")
    loss, gradients = step(compiled, batch, use_cache=False, cu_seq_lens_q=tiny.cu_seqlens(parts))
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    expected = step(plain, batch, use_cache=False)
    assert_same_step((loss, gradients), expected, in_float64(plain, batch, use_cache=False))
    torch.compiler.reset()


def test_fully_sharded(tmp_path):
    """Two ranks, one thread each: every parameter's gradient as on one; patching afterwards is refused."""
    plain = tiny.model()
    batch = tiny.packed(plain, tiny.samples(plain))
    expected = step(plain, batch, use_cache=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.save((plain.state_dict(), batch), tmp_path / "inputs.pt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, __name__])
    ranks = [context.Process(target=_sharded_rank, args=(rank, port, tmp_path), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode == 0
    loss, gradients, refused = torch.load(tmp_path / "outputs.pt")
    assert_same_step((loss, gradients), expected, in_float64(plain, batch, use_cache=False))
    assert "fully_shard, …) must be taken off first" in refused["unpatch"]
    assert "fully_shard was applied to" in refused["patch"]
    assert "patch before fully_shard" in refused["patch"]


def _sharded_rank(rank: int, port: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    state, batch = torch.load(folder / "inputs.pt")
    model, refused = tiny.model(), {}
    model.load_state_dict(state)
    patch(model)
    for part in (*model.model.language_model.layers, *model.model.visual.blocks, model.lm_head, model):
        fully_shard(part)
    loss, gradients = step(model, batch)
    gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    other = tiny.model()
    fully_shard(other.model.language_model.layers[0])
    for name, change, sharded in (("unpatch", unpatch, model), ("patch", patch, other)):
        with pytest.raises(ValueError) as error:
            change(sharded)
        refused[name] = str(error.value)
    if rank == 0:
        torch.save((loss, gradients, refused), folder / "outputs.pt")
    dist.barrier()
    dist.destroy_process_group()
