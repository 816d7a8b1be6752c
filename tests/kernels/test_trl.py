"""``integrations.trl`` in the trainers of the TRL that is installed, against TRL's own function."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging

import pytest
import torch
import transformers

import m4ov_kernels
from m4ov_kernels.integrations import trl as ours
from m4ov_kernels.invariance import checkpoint_contexts

from . import tiny_models
from .numerics import assert_accurate, leaves
from .scored import NAMES, scored, terms

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed: pip install 'm4ov[trl]'", allow_module_level=True)

WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(autouse=True)
def _off_again():
    yield
    ours.remove()


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5.0, 0.5), (1.3, 20.0, 3.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_is_trls(dtype, temperature, softcap, scale):
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, bias = torch.randn(37, 24).to(dtype), torch.randn(90, 24).to(dtype), torch.randn(90).to(dtype)
    targets = torch.randint(90, (37,))
    grads = torch.randn(2, 37)
    rest = (temperature, 32, softcap, scale, NAMES)

    def run(function, dtype):
        tensors = leaves(dtype, hidden, weight, bias)
        found = function(*tensors, targets, *rest)
        gradients = torch.autograd.grad(found[:2], tensors, [grad.to(found[0].dtype) for grad in grads])
        assert not any(value.requires_grad for value in found[2:])
        return [*found, *gradients]

    got = run(ours.Logprobs(rounded=False, invariant=False).apply, dtype)
    plain = run(ChunkedLogProbFunction.apply, dtype)

    options = (temperature, softcap, scale)
    exact = run(lambda *given: scored(*given[:4], *options), torch.float64)
    assert torch.equal(got[4], exact[4])
    sizes = terms(hidden, weight, bias, targets, grads, *options)
    for name, mine, theirs, truth in zip((*NAMES, "hidden", "weight", "bias"), got, plain, exact, strict=True):
        if name != "is_top1":
            assert_accurate(name, mine, theirs, truth, sizes[name])


def test_only_what_is_asked_for():
    hidden, weight, targets = torch.randn(5, 8), torch.randn(20, 8), torch.randint(20, (5,))
    apply = ours.Logprobs(rounded=False, invariant=False).apply
    found = apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("log_probs",))
    assert [value is None for value in found] == [False, True, True, True, True]
    for scale, temperature in ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            apply(hidden, weight, None, targets, temperature, 8, None, scale, ("log_probs",))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_under_autocast(backend):
    """In its dtype, as TRL's, but with fp32 logits; gradients come in the dtype of the weights."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, targets = torch.randn(20, 48), torch.randn(70, 48), torch.randint(70, (20,))
    rest = (0.7, 32, None, 1.0, ("log_probs", "entropy"))

    def run(function, dtype=torch.float32):
        tensors = leaves(dtype, hidden.bfloat16(), weight.bfloat16())
        found = function(*tensors, None, targets, *rest)[:2]
        return [*found, *torch.autograd.grad([value.sum() for value in found], tensors)]

    with contextlib.nullcontext() if backend == "auto" else m4ov_kernels.backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(ours.Logprobs(rounded=False, invariant=False).apply)
            plain = run(ChunkedLogProbFunction.apply)
        exact = run(lambda *given: scored(*given[:4], 0.7), torch.float64)
    sizes = terms(hidden, weight, None, targets, torch.ones(2, 20), 0.7)
    for name, mine, theirs, truth in zip(("log_probs", "entropy", "hidden", "weight"), got, plain, exact, strict=True):
        assert_accurate(name, mine, theirs, truth, sizes[name])
    assert (got[0] - exact[0]).abs().max() < 1e-4 < (plain[0] - exact[0]).abs().max()


def test_a_row_keeps_its_bits():
    hidden, weight, targets = torch.randn(90, 48), torch.randn(700, 48), torch.randint(700, (90,))
    apply = ours.Logprobs(rounded=False, invariant=True).apply
    rest = (0.7, 32, None, 1.0, ("log_probs", "entropy"))
    whole, some = apply(hidden, weight, None, targets, *rest), torch.randperm(90)[:7]
    for part, all_ in zip(apply(hidden[some], weight, None, targets[some], *rest)[:2], whole[:2], strict=True):
        assert torch.equal(part, all_[some])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "user", "assistant", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(dtype=torch.float32, **options):
    config = transformers.Qwen3Config(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        **options,
    )
    made = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return made.to(dtype)


def sentence(count):
    return " ".join(WORDS[number] for number in torch.randint(len(WORDS), (count,)))


def arguments(folder, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "optim": "sgd",  # Adam would make a step of the rounding of a gradient that is nearly 0
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
        **more,
    }


def sft(folder, made, data, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**arguments(folder, completion_only_loss=True, max_length=32, **options))
    trainer = SFTTrainer(made, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer())
    return trainer


def grpo(folder, made, data, peft_config=None, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(len(set(text.split()))) + (hash_of(text) % 7) for text in completions]

    config = GRPOConfig(**arguments(folder, num_generations=4, max_completion_length=9, **options))
    return GRPOTrainer(
        made,
        reward,
        config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def hash_of(text):
    return sum(map(ord, text))


def curve(trainer):
    """Each step's loss, gradient norm and entropy; then the parameters."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(11)
    trainer.train()
    steps = [
        [entry[name] for name in ("loss", "grad_norm", "entropy")]
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    assert len(steps) == trainer.args.max_steps
    return torch.tensor(steps), [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same_training(make, spy):
    """``make(options)`` trained with TRL's function and with ours: fp32's roundings apart."""
    trainer = make()
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    theirs, their_parameters = curve(trainer)
    assert max(float((x - y).abs().max()) for x, y in zip(before, their_parameters, strict=True)) > 1e-4, "no training"
    ours.install()
    spy()
    mine, my_parameters = curve(make())
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    for got, expected in zip(my_parameters, their_parameters, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (theirs[:, 1] > 1e-3).all()


@pytest.fixture
def spy(monkeypatch):
    """Counts the calls of ours that a trainer makes."""
    calls = []

    def watch():
        from trl.trainer import utils

        function = utils._ChunkedLogProbFunction
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *given: calls.append(given[3].numel()) or apply(*given), raising=False
        )

    watch.calls = calls
    return watch


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(tmp_path, spy, loss_type):
    data = [{"prompt": sentence(5), "completion": " " + sentence(length)} for length in (3, 9, 1, 6) * 3]
    made = model(tie_word_embeddings=loss_type == "dft")
    same_training(lambda: sft(tmp_path, copy.deepcopy(made), data, loss_type=loss_type), spy)
    assert len(spy.calls) == 3
    assert max(spy.calls) < 4 * 13, "tokens of prompts and padding were scored"


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_grpo(tmp_path, spy, kind):
    from peft import LoraConfig

    data = [{"prompt": sentence(length)} for length in (4, 7, 2, 5)]
    made = model()
    made.save_pretrained(tmp_path / "model")
    made.config._name_or_path = str(tmp_path / "model")  # where the trainer finds the reference model
    options = {"temperature": 0.8, "beta": 0.05, "num_iterations": 2, "gradient_accumulation_steps": 2}
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

    def make():
        torch.manual_seed(3)  # of the adapters
        config = LoraConfig(**lora) if kind == "lora" else None
        return grpo(tmp_path, copy.deepcopy(made), data, config, **options)

    same_training(make, spy)
    assert len(spy.calls) >= 3 * 2


def test_grpo_of_trl_at_rate_zero(tmp_path, monkeypatch):
    """Inside ``invariant()`` the ratio is 1 to the bit for 20 steps: scored in one batch with the samples of a whole
    step, trained in micro-batches."""
    data = [{"prompt": sentence(length)} for length in (4, 7, 2, 5)]
    options = {"max_steps": 20, "learning_rate": 0.0, "num_iterations": 2, "gradient_accumulation_steps": 2}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    trainer = grpo(tmp_path, model(), data, temperature=0.8, **options)
    scores, ratios = [], []
    scorer, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def remember(*args, **kwargs):
        found = scorer(*args, **kwargs)
        scores.append(found[0].detach())
        return found

    def compare(unwrapped, batch):
        result = loss(unwrapped, batch)
        mask = batch["completion_mask"].bool()
        ratios.append((scores[-1] - batch["old_per_token_logps"]).exp()[mask])
        return result

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", remember)
    monkeypatch.setattr(trainer, "_compute_loss", compare)
    ours.install(invariant=True)
    try:
        with m4ov_kernels.invariant():
            trainer.train()
    finally:
        ours.remove()
    assert len(ratios) == 2 * 20
    assert len({tuple(one.shape) for one in scores}) > 1, "scored and trained in the same batches"
    assert all((ratio == 1.0).all() for ratio in ratios)
    clipped = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert clipped == [0.0] * 20


def test_log_probs_of_grpo_are_the_models(tmp_path):
    """Of a bf16 model, and nearer to the exact ones than TRL's, which rounds logits."""
    data = [{"prompt": sentence(4)}] * 4
    trainer = grpo(tmp_path, model(torch.bfloat16), data, temperature=0.7)
    input_ids = torch.randint(4, 60, (3, 12))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0

    def score():
        with torch.no_grad():
            found = trainer._get_per_token_logps_and_entropies(
                trainer.model, input_ids, attention_mask, 8, compute_entropy=True
            )
        return found[:2]

    theirs = score()
    ours.install()
    got = score()
    ours.install(numerics="hf")
    rounded = score()
    with torch.no_grad():
        hidden = trainer.model.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -9:-1]
        flat, weight = hidden.reshape(-1, hidden.shape[-1]).double(), trainer.model.lm_head.weight.double()
        exact = scored(flat, weight, None, input_ids[:, -8:].reshape(-1), 0.7)[:2]
    for name, mine, other, truth in zip(("log_probs", "entropy"), got, theirs, exact, strict=True):
        truth = truth.view(3, 8)
        assert_accurate(name, mine, other, truth)
        assert (mine - truth).abs().max() < 1e-5 < (other - truth).abs().max()
    assert (rounded[0] - theirs[0]).abs().max() < 0.05  # both round to bf16, ours the quotient by the temperature, too
    assert not torch.equal(rounded[0], got[0])


def test_on_and_off():
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    compact = utils._use_triton
    ours.remove()  # nothing to do
    ours.install()
    ours.install(numerics="hf", invariant=True)
    assert utils._ChunkedLogProbFunction.options == {"rounded": True, "invariant": True}
    assert utils._use_triton(torch.device("cpu"))
    ours.remove()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert utils._use_triton is compact


def test_refused(monkeypatch):
    from trl.trainer import utils

    with pytest.raises(ValueError, match="numerics must be one of 'hf', 'fp32'; got 'vllm'"):
        ours.install(numerics="vllm")
    with pytest.raises(TypeError, match="invariant must be a bool"):
        ours.install(invariant=1)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", torch.nn.functional.linear)
    with pytest.raises(RuntimeError, match=r"trl \d.* does not compute log-probabilities as 1.16 does"):
        ours.install()


@pytest.mark.parametrize("patched", [False, True])
def test_a_vision_language_model(patched):
    from trl.trainer.utils import add_fused_lm_head

    made = tiny_models.model("qwen3_vl")
    if patched:
        m4ov_kernels.patch(made)
    add_fused_lm_head(made, temperature=0.9, outputs=("log_probs", "entropy", "is_top1"))
    batch = tiny_models.padded(made, tiny_models.samples(made))

    def run():
        made.zero_grad()
        found = made(**batch, fused_lm_head=True)
        (found.loss + 0.1 * found.entropy.sum()).backward()
        grads = [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]
        return [found.loss, found.log_probs, found.entropy, found.is_top1.float(), *grads]

    theirs = run()
    ours.install()
    for mine, other in zip(run(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_no_label_counts():
    from trl.trainer.utils import add_fused_lm_head

    made = model()
    add_fused_lm_head(made)
    ours.install()
    ids = torch.randint(4, 60, (2, 6))
    loss = made(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())
