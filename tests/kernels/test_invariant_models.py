"""Drift between sampler and trainer at learning rate 0: none, to the bit, inside ``invariant()``.

A sampler that prefills a prompt and decodes token by token with a cache, one sample at a time or in a padded batch; a
trainer that scores the same tokens in training mode, packed or padded, in changing company. The importance ratio is 1.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from torch.nn import functional as F

import m4ov_kernels
from m4ov_kernels import invariant, linear_logprob
from m4ov_kernels.head.losses import group_advantages, policy_loss
from m4ov_kernels.invariance import checkpoint_contexts
from m4ov_kernels.numerics import certify

from . import tiny_models as tiny
from .numerics import assert_accurate

NEW = 6  # tokens that a rollout samples
STEPS = 20


def model(dtype):
    made = tiny.model("qwen3_vl", layers=2).to(dtype)
    m4ov_kernels.patch(made)
    return made


def questions(owner):
    pictures = ([(4, 4)], [(4, 8)], [], [(2, 6), (6, 4)])
    return [tiny.sample(owner, words + NEW, images) for words, images in zip((9, 12, 3, 15), pictures, strict=True)]


def inputs(dtype, batch, *without):
    kept = {name: value for name, value in batch.items() if name not in ("labels", *without)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}


def logprobs(owner, hidden, targets):
    return linear_logprob(hidden, owner.lm_head.weight, targets).logprob


def rollout(owner, part):
    """Log-probabilities ``[NEW]`` of a sample's last tokens, as they come: prefill, then one token after another."""
    dtype, length = owner.lm_head.weight.dtype, part.input_ids.shape[1]
    positions = part.positions[1:] if part.positions.shape[0] == 4 else part.positions
    given = inputs(dtype, tiny.packed(owner, [part]), "position_ids", "input_ids", "mm_token_type_ids")
    begin, found = length - NEW, []
    with torch.no_grad():
        types = tiny.token_types(part.input_ids)[:, :begin]
        out = owner.model(
            input_ids=part.input_ids[:, :begin],
            mm_token_type_ids=types,
            position_ids=positions[..., :begin],
            use_cache=True,
            **given,
        )
        for at in range(begin, length):
            found.append(logprobs(owner, out.last_hidden_state[:, -1], part.input_ids[:, at]))
            out = owner.model(
                input_ids=part.input_ids[:, at : at + 1],
                position_ids=positions[..., at : at + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    return torch.cat(found)


def score(owner, parts, padded):
    """The same by one call of a trainer: ``[samples · NEW]``, differentiable."""
    dtype = owner.lm_head.weight.dtype
    if padded:
        batch = inputs(dtype, tiny.padded(owner, parts))
        hidden = owner.model(**batch, use_cache=False).last_hidden_state
        rows = list(hidden)
    else:
        bounds = tiny.cu_seqlens(parts)
        batch = inputs(dtype, tiny.packed(owner, parts))
        hidden = owner.model(**batch, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False).last_hidden_state
        rows = hidden[0].split(bounds.diff().tolist())
    lengths = [part.input_ids.shape[1] for part in parts]
    kept = [row[length - NEW - 1 : length - 1] for row, length in zip(rows, lengths, strict=True)]
    targets = torch.cat([part.input_ids[0, -NEW:] for part in parts])
    return logprobs(owner, torch.cat(kept), targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_stays_one(dtype):
    owner = model(dtype)
    parts = questions(owner)
    optimizer = torch.optim.AdamW(owner.parameters(), lr=0.0, weight_decay=0.0)
    advantages = group_advantages(torch.randn(len(parts)), groups=1).advantages
    chosen = random.Random(int(torch.randint(2**31, ())))
    with invariant():
        owner.eval()
        old = [rollout(owner, part) for part in parts]
        owner.train()
        last = {}
        for step in range(STEPS):
            order = chosen.sample(range(len(parts)), len(parts))
            cut, threads = chosen.randint(0, len(parts)), torch.get_num_threads()
            torch.set_num_threads(chosen.randint(1, 2))
            for number, some in enumerate(filter(None, (order[:cut], order[cut:]))):
                found = score(owner, [parts[at] for at in some], padded=(step + number) % 2 == 1)
                last |= dict(zip(some, found.detach().split(NEW), strict=True))
                before = torch.cat([old[at] for at in some])
                loss, metrics = policy_loss(
                    found,
                    before,
                    advantages[some],
                    torch.arange(len(some) + 1) * NEW,
                    normalizer=float(len(parts) * NEW),
                    kind="dapo",
                    rollout_logprob=before,
                    correction="tis",
                )
                loss.backward()
                assert (metrics["ratio_min"], metrics["ratio_max"]) == (1.0, 1.0)
                for name in ("clip_fraction_low", "clip_fraction_high", "policy_kl_k3", "mismatch_max"):
                    assert metrics[name] == 0.0, name
            torch.set_num_threads(threads)
            optimizer.step()
            optimizer.zero_grad()
    sampled, trained = torch.cat(old), torch.cat([last[at] for at in range(len(parts))])
    found = certify(sampled, trained)
    assert found.total.identical == found.total.tokens == len(parts) * NEW
    assert found.total.max_abs == 0.0


def test_without_it_the_two_differ():
    """What the other tests of this file could not be without it: PyTorch's own linears and attention."""
    owner = model(torch.bfloat16)
    parts = questions(owner)
    sampled = torch.cat([rollout(owner.eval(), part) for part in parts])
    trained = score(owner.train(), parts, padded=True).detach()
    assert certify(sampled, trained).total.max_abs > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_samples_what_is_trained(dtype):
    """Hugging Face's ``generate`` of a batch padded on the left, with its cache; then one packed training call."""
    owner = model(dtype).eval()
    prompts = [tiny.sample(owner, words, images) for words, images in ((9, [(4, 4)]), (4, []), (6, [(2, 6)]))]
    longest = max(part.input_ids.shape[1] for part in prompts)

    def left(values):
        return torch.cat([F.pad(value, (longest - value.shape[1], 0)) for value in values])

    ids = left([part.input_ids for part in prompts])
    given = inputs(dtype, tiny.packed(owner, prompts), "position_ids", "input_ids", "mm_token_type_ids")
    with invariant(), torch.no_grad():
        made = owner.generate(
            input_ids=ids,
            attention_mask=left([torch.ones_like(part.input_ids) for part in prompts]),
            mm_token_type_ids=tiny.token_types(ids),
            do_sample=True,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            suppress_tokens=list(range(tiny.WORDS, tiny.VOCABULARY)),
            pad_token_id=0,
            eos_token_id=1,
            output_hidden_states=True,
            return_dict_in_generate=True,
            **given,
        )
        new = made.sequences[:, longest:]
        hidden = torch.stack([step[-1][:, -1] for step in made.hidden_states], 1)
        sampled = logprobs(owner, hidden, new)
    parts = []
    for part, tokens in zip(prompts, new, strict=True):
        whole = torch.cat((part.input_ids, tokens[None]), 1)
        positions = tiny._positions(owner, whole, part.vision)
        parts.append(tiny.Sample(whole, positions, torch.full_like(whole, -100), part.vision))
    owner.train()
    with invariant():
        for padded in (False, True):
            trained = score(owner, parts, padded).detach()
            assert torch.equal(trained, sampled.flatten())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_hidden_states_keep_their_bits(dtype, checkpointing):
    owner = model(dtype)
    parts = questions(owner)
    if checkpointing:
        owner.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    embeddings = []
    hook = owner.get_input_embeddings().register_forward_hook(lambda *seen: embeddings.append(seen[2]))
    found = {}
    with invariant():
        for some in ((0, 1, 2, 3), (2,), (3, 1), (1, 0)):
            embeddings.clear()
            total = score(owner, [parts[at] for at in some], padded=False).sum()
            embeddings[0].retain_grad()
            total.backward()
            lengths = [parts[at].input_ids.shape[1] for at in some]
            for at, part in zip(some, embeddings[0].grad[0].split(lengths), strict=True):
                assert torch.equal(found.setdefault(at, part), part), (at, some)
    hook.remove()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x @ x.mT, r"matmul of \[1, 2, 4, 8\], \[1, 2, 8, 4\] is PyTorch's"),
        (lambda x: torch.bmm(x[0], x[0].mT), "bmm of"),
        (lambda x: torch.einsum("bhqd,bhkd->bhqk", x, x), "einsum of"),
        (lambda x: torch.linalg.matmul(x, x.mT), "matmul of"),
        (lambda x: torch.compile(F.linear, backend="eager", fullgraph=True)(x, x[0, 0]), "compile"),
        (lambda x: F.conv1d(x[0], x[0][..., :3]), "conv1d of"),
        (lambda x: F.linear(x.double(), x[0, 0].double()), "got torch.float64 on cpu"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "without dropout"),
        (lambda x: F.scaled_dot_product_attention(x, x[..., :3, :], x[..., :3, :], is_causal=True), "4 queries and 3"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, torch.randn(1, 1, 4, 4)), "a mask that adds to scores"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(4).flip(0)[None, None] == 0), "a run of keys"),
        (lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1]), "without enable_gqa"),
        (lambda x: linear_logprob(x.double(), x[0, 0].double(), torch.zeros(1, 2, 4).long()), "reference"),
    ],
)
def test_what_cannot_be_kept_is_refused(call, message):
    x = torch.randn(1, 2, 4, 8)
    with contextlib.suppress(AttributeError):
        call(x)  # outside it is allowed
    with invariant(), pytest.raises(RuntimeError, match=message):
        call(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_masks_is_pytorchs(dtype):
    """Causal masks padded on either side, additive ones, caches with room: PyTorch's values, and a row's own bits."""
    q, k, v = (torch.randn(3, heads, 9, 16).to(dtype) for heads in (4, 2, 2))
    causal = torch.ones(9, 9).tril().bool()
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, :4] = valid[1, 6:] = False
    padded = causal & valid[:, None, None, :]
    additive = torch.zeros(padded.shape).masked_fill(~padded, torch.finfo(torch.float32).min).to(dtype)
    room = (torch.arange(9) < 5)[None, None, None, :].expand(3, 1, 1, 9)
    for mask, last in ((padded, 9), (additive, 9), (room, 1), (valid[:, None, None, :].expand(3, 1, 9, 9), 9)):
        query = q[:, :, -last:]
        exact_mask = mask if mask.dtype is torch.bool else mask.double()
        plain = F.scaled_dot_product_attention(query, k, v, mask, enable_gqa=True)
        exact = F.scaled_dot_product_attention(*(x.double() for x in (query, k, v)), exact_mask, enable_gqa=True)
        with invariant():
            found = F.scaled_dot_product_attention(query, k, v, mask, enable_gqa=True)
        sees = (mask if mask.dtype is torch.bool else mask == 0)[:, 0].any(-1)
        got, theirs, truth = (x.transpose(1, 2)[sees] for x in (found, plain, exact))
        assert_accurate("attended", got, theirs, truth)
        assert not found.transpose(1, 2)[~sees].any()
    with invariant():
        alone = F.scaled_dot_product_attention(
            q[:1, :, 4:], k[:1, :, 4:], v[:1, :, 4:], is_causal=True, enable_gqa=True
        )
        batch = F.scaled_dot_product_attention(q, k, v, padded, enable_gqa=True)
    assert torch.equal(batch[0, :, 4:], alone[0])


def test_autocast_and_ends():
    linear, x = torch.nn.Linear(8, 3), torch.randn(5, 8)
    with invariant(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype is torch.bfloat16
    with contextlib.suppress(KeyError), invariant():
        raise KeyError
    assert torch.equal(x @ x.mT, x.matmul(x.mT))
