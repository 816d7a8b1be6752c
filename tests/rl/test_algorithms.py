"""The online losses of a whole model against their definitions by logits that are whole, in float64; sums and counts
over any split; references; what is watched."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from m4ov.rl.algorithms import PolicyBatch, PolicyLoss
from m4ov.rl.metrics import Window
from m4ov.rl.reference import Reference
from m4ov.rl.responses import Responses, answered, response_logprob
from m4ov.rl_recipe import ONLINE, AlgorithmConfig, PerceptionConfig, ReferenceConfig
from m4ov_kernels.nn import load_balancing_loss
from m4ov_kernels.packing import PackedBatch
from tests.kernels import losses_plain as plain
from tests.rl import small
from tests.rl.test_perception import written_out

SEED = int(os.environ["M4OV_TEST_SEED"])
SEEDS = (4, 5, 6)


def policy_batch(seed=SEED, temperature=1.0):
    """As it would be drawn from the older of two policies, by a sampler that computes a little otherwise."""
    pack = small.batch(seed)
    _, before = small.worlds_apart()
    random = torch.Generator().manual_seed(seed)
    old = response_logprob(before, pack, temperature=temperature)
    rollout = old + 0.5 * torch.randn(old.shape, generator=random, dtype=old.dtype)
    advantages = torch.randn(len(pack), generator=random)
    return PolicyBatch(pack, advantages, old, rollout, image_seeds=SEEDS)


def defined(policy, batch, name, temperature=1.0, reference=None, **options):
    """The sum of the losses, by padded loops over logits that are whole."""
    words, lengths = small.chosen(batch.packed), [len(each) for each in small.chosen(batch.packed)]
    found = small.log_probabilities(policy, batch.packed, temperature)
    rows = {
        "logprob": torch.cat([p.gather(1, w[:, None])[:, 0] for p, w in zip(found, words, strict=True)]),
        "entropy": torch.cat([-(p.exp() * p).sum(1) for p in found]),
        "old_logprob": batch.old_logprob,
        "rollout_logprob": batch.rollout_logprob,
    }
    if rows["old_logprob"] is None:
        rows["old_logprob"] = rows["logprob"].detach()
    if reference is not None:
        with torch.no_grad():
            other = small.log_probabilities(reference, batch.packed, temperature)
        rows["ref_logprob"] = torch.cat([q.gather(1, w[:, None])[:, 0] for q, w in zip(other, words, strict=True)])
        rows["exact_kl"] = torch.cat([(p.exp() * (p - q)).sum(1) for p, q in zip(found, other, strict=True)])
    padded = {key: plain.padded(value, lengths) for key, value in rows.items() if value is not None}
    keep = plain.padded(torch.ones(sum(lengths), dtype=torch.bool), lengths)
    wide = {"clip": (0.8, 1.2)} if name == "gspo" else {}
    return plain.policy(padded, keep, batch.advantages.double(), 1.0, name, **wide, **options)[0]


def config(name, **options):
    """GSPO with wide bounds: its own, 3e-4, may clip every sequence of so few."""
    wide = {"clip_low": 0.2, "clip_high": 0.2} if name == "gspo" else {}
    return AlgorithmConfig(name=name, max_length=8, **wide, **options)


@pytest.mark.parametrize("name", ONLINE)
def test_against_the_definition(name):
    policy, _ = small.worlds_apart()
    batch = policy_batch(temperature=0.8)
    loss, count = PolicyLoss(config(name, temperature=0.8))(policy, batch)
    expected = defined(policy, batch, name, 0.8)
    assert count == {"grpo": 4, "gspo": 4, "dr_grpo": 5 * 8}.get(name, 14)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    small.assert_same(small.gradients(policy, loss), small.gradients(policy, expected))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"kl_coef": 0.3}, {"kl_coef": 0.3}),
        ({"kl_coef": 0.2, "kl_kind": "exact"}, {"kl_coef": 0.2, "kl_kind": "exact"}),
        (
            {"kl_coef": 0.3, "kl_kind": "k2", "entropy_coef": 0.05},
            {"kl_coef": 0.3, "kl_kind": "k2", "entropy_coef": 0.05},
        ),
        ({"correction": "tis"}, {"correction": "tis"}),
        (
            {"correction": "icepop", "correction_low": 0.7, "correction_high": 1.5},
            {"correction": "icepop", "bounds": (0.7, 1.5)},
        ),
        ({"correction": "mis", "correction_level": "geometric"}, {"correction": "mis", "level": "geometric"}),
    ],
)
def test_reference_entropy_and_correction_against_the_definition(name, options, theirs):
    policy, before = small.worlds_apart()
    held = ReferenceConfig("frozen")
    batch = policy_batch(SEED + 1)
    loss, _ = PolicyLoss(config(name, reference=held, **options), reference=Reference(held, before))(policy, batch)
    expected = defined(policy, batch, name, reference=before, **theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-9)
    small.assert_same(small.gradients(policy, loss), small.gradients(policy, expected))


@pytest.mark.parametrize("kl", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo"])
def test_perception_is_in_the_same_mean(name, kl):
    policy, _ = small.worlds_apart()
    batch = policy_batch(SEED + 2)
    seen = PerceptionConfig(weight=0.4, kl=kl, entropy=0.03, masked_entropy=0.02)
    loss, count = PolicyLoss(config(name), seen)(policy, batch)
    assert count == PolicyLoss(config(name)).count(Responses.of(batch.packed), 5)
    expected = defined(policy, batch, name)
    if name == "grpo":  # means of sequences
        for sample, length in ((0, 4), (1, 1), (4, 3)):
            expected = expected + written_out(policy, batch.packed[sample], seen, _seeds(sample), 1.0)[0] / length
    else:
        expected = expected + written_out(policy, batch.packed, seen, SEEDS, 1.0)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-9)
    small.assert_same(small.gradients(policy, loss), small.gradients(policy, expected), rtol=1e-6)


def _seeds(sample):
    """Of the images that a sample shows, in their order."""
    return [SEEDS[image] for image in small.batch(SEED + 2).images.shown[sample]]


@pytest.mark.parametrize("name", ONLINE)
def test_parts_of_a_step_add_up(name):
    """Sums and counts of micro-batches, as of ranks, are those of one batch; so the mean is over all of them."""
    policy, before = small.worlds_apart()
    held = ReferenceConfig("frozen")
    loss_of = PolicyLoss(
        config(name, kl_coef=0.1, correction="tis", reference=held), PerceptionConfig(0.2), Reference(held, before)
    )
    batch = policy_batch()
    whole, count = loss_of(policy, batch)
    metrics = loss_of.window.close()
    bounds = Responses.of(batch.packed).cu_seqlens.tolist()
    parts = []
    for samples in ([0, 1], [2], [3, 4]):
        rows = slice(bounds[samples[0]], bounds[samples[-1] + 1])
        seeds = tuple(dict.fromkeys(SEEDS[image] for sample in samples for image in batch.packed.images.shown[sample]))
        parts.append(
            PolicyBatch(
                batch.packed[samples],
                batch.advantages[samples],
                batch.old_logprob[rows],
                batch.rollout_logprob[rows],
                image_seeds=seeds,
            )
        )
    found = [loss_of(policy, part) for part in parts]
    torch.testing.assert_close(sum(loss for loss, _ in found), whole, rtol=1e-9, atol=1e-9)
    assert sum(part for _, part in found) == count
    of_parts = loss_of.window.close()
    for name_of in ("effective_sample_size", "rollout_effective_sample_size"):  # of each batch by itself
        assert 0 < of_parts.pop(name_of) <= 1
        assert 0 < metrics.pop(name_of) <= 1
    assert of_parts == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    assert metrics["loss"] == pytest.approx(whole.item() / count, rel=1e-5)
    assert metrics["tokens"] == 14
    assert metrics["perception_tokens"] == pytest.approx(8 / 14)
    assert metrics["perception_kl"] > 0
    assert metrics["ratio_max"] > metrics["ratio_min"] > 0
    assert metrics["rollout_weight_mean"] > 0


def test_metrics_of_ranks_are_those_of_the_step():
    """What ``World.reduce`` would make of two ranks' windows."""
    rows = [
        ({"loss": 3.0, "ratio_mean": 1.0, "ratio_max": 2.0, "ratio_min": 0.5, "tokens": 4.0}, 2, 4),
        ({"loss": 1.0, "ratio_mean": 2.0, "ratio_max": 1.5, "ratio_min": 0.2, "tokens": 6.0}, 3, 6),
    ]
    ranks = [Window() for _ in rows]
    sent: dict[bool, list[list[float]]] = {False: [], True: []}

    def gather(what, values, *, largest=False):
        sent[largest].append(list(values))
        return values

    for window, (values, count, weight) in zip(ranks, rows, strict=True):
        window.add({name: torch.tensor(value) for name, value in values.items()}, count=count, weight=weight)
        window.close(gather)
        window.add({name: torch.tensor(value) for name, value in values.items()}, count=count, weight=weight)

    def reduce(what, values, *, largest=False):
        columns = zip(*sent[largest], strict=True)
        return [max(column) if largest else sum(column) for column in columns]

    found = [window.close(reduce) for window in ranks]
    assert found[0] == found[1]
    expected = {"loss": 4 / 5, "ratio_mean": 1.6, "ratio_max": 2.0, "ratio_min": 0.2, "tokens": 10.0}
    assert found[0] == pytest.approx(expected)


def test_a_first_step_has_the_ratio_one_and_a_gradient():
    policy = small.model()
    batch = policy_batch()
    first = PolicyBatch(batch.packed, batch.advantages)
    loss_of = PolicyLoss(config("dapo"))
    loss, _ = loss_of(policy, first)
    expected = defined(policy, first, "dapo")
    small.assert_same(small.gradients(policy, loss), small.gradients(policy, expected))
    metrics = loss_of.window.close()
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1


def test_float32_and_bfloat16_do_not_go_astray():
    """Losses and gradients near those of float64, in the model's own dtypes."""
    exact_policy, batch = small.model(), policy_batch()
    loss_of = PolicyLoss(config("dapo", kl_coef=0.0), PerceptionConfig(0.1))
    exact, _ = loss_of(exact_policy, batch)
    exact.backward()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        policy = small.model(dtype=dtype)
        policy.load_state_dict(exact_policy.state_dict())
        loss, _ = loss_of(policy, batch)
        loss.backward()
        assert loss.dtype is torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=tolerance, abs=tolerance)
        grads = [policy.lm_head.weight.grad.double(), exact_policy.lm_head.weight.grad]
        assert torch.cosine_similarity(*(grad.flatten() for grad in grads), dim=0) > 1 - tolerance


def test_experts_are_balanced_in_the_same_mean():
    policy = small.model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.5)
    batch = policy_batch()
    first = PolicyBatch(batch.packed, batch.advantages)
    balanced, count = PolicyLoss(config("dapo"))(policy, first)
    object.__setattr__(policy.config.text, "router_aux_loss_coef", 0.0)
    plain_loss, _ = PolicyLoss(config("dapo"))(policy, first)
    expected = 0.5 * load_balancing_loss(policy(batch.packed).loads, tokens=batch.packed.tokens)
    assert (balanced - plain_loss).item() / count == pytest.approx(expected.item(), rel=1e-5)


def test_an_answer_is_put_behind_its_prompt():
    random = np.random.default_rng(SEED)
    asked = small.prompt(random, (small.image(random),))
    tokens = torch.tensor([5, 6, small.END])
    sample = answered(asked, tokens, **small.VISION)
    assert sample.input_ids.tolist() == [*asked.input_ids.tolist(), 5, 6, small.END]
    assert sample.labels.tolist() == [-100] * len(asked.input_ids) + [5, 6, small.END]
    assert answered(asked, tokens[:0], **small.VISION).labels.tolist() == [-100] * len(asked.input_ids)
    assert sample.images is asked.images
    drawn = answered(asked, torch.tensor([5, small.IMAGE, small.VIDEO]), **small.VISION)  # no image belongs to these
    assert drawn.mm_token_type_ids.tolist() == [0, *[1] * 6, *[0] * (len(asked.input_ids) - 7), 0, 0, 0]
    pack = PackedBatch.from_samples([drawn], **small.VISION, merge_size=2)
    assert torch.isfinite(small.model()(pack).hidden_states).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ppo"}, "algorithm.name: expected grpo, dr_grpo"),
        ({"name": "dr_grpo"}, "algorithm.max_length: expected at least 1 with dr_grpo"),
        ({"kl_coef": 0.1}, "algorithm.reference.kind: expected another than none, with kl_coef"),
        ({"name": "mpo"}, "algorithm.reference.kind: expected another than none, with mpo"),
        ({"temperature": 0.0}, "algorithm.temperature: expected more than 0"),
        ({"correction": "ice"}, "algorithm.correction: expected none, tis, icepop, mis"),
        ({"kl_kind": "k4"}, "algorithm.kl_kind"),
        ({"beta": 0.0}, "algorithm.beta"),
    ],
)
def test_what_a_recipe_is_refused_for(options, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**options)


def test_what_a_loss_is_refused_for():
    policy, held = small.model(), ReferenceConfig("frozen")
    with pytest.raises(ValueError, match=r"algorithm\.name: expected one of grpo"):
        PolicyLoss(AlgorithmConfig(name="dpo", reference=held))
    with pytest.raises(ValueError, match=r"algorithm\.kl_coef: 0\.1 needs a reference"):
        PolicyLoss(AlgorithmConfig(kl_coef=0.1, reference=held))
    batch = policy_batch()
    with pytest.raises(ValueError, match="old_logprob"):
        PolicyLoss(config("grpo"))(policy, PolicyBatch(batch.packed, batch.advantages, batch.old_logprob[1:]))
    with pytest.raises(ValueError, match="advantages"):
        PolicyLoss(config("grpo"))(policy, PolicyBatch(batch.packed, batch.advantages[1:]))
    with pytest.raises(ValueError, match="seeds: expected 3"):
        PolicyLoss(config("grpo"), PerceptionConfig(0.1))(policy, PolicyBatch(batch.packed, batch.advantages))
