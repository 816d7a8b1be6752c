"""``integrations.transformers``: any causal model's own loss and gradients, without logits; on and off."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers
from transformers.loss.loss_utils import ForCausalLMLoss

import m4ov_kernels
from m4ov_kernels.integrations.transformers import install, remove

from . import tiny_models
from .numerics import assert_accurate

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model(kind="Qwen3", **options):
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


def batch():
    ids = torch.randint(3, 64, (2, 11))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100)
    return {"input_ids": ids, "labels": labels}


def step(made, **inputs):
    made.zero_grad()
    outputs = made(**inputs)
    outputs.loss.backward()
    return outputs, [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "Mistral", "Qwen2"])
def test_the_models_own_loss(kind, dtype):
    made, inputs = model(kind), batch()
    exact, exact_gradients = step(copy.deepcopy(made).double(), **inputs)
    made = made.to(dtype)
    plain, plain_gradients = step(made, **inputs)
    report = install(made)
    assert len(report) == 3
    got, gradients = step(made, **inputs)
    assert got.logits is None
    assert_accurate("loss", got.loss, plain.loss, exact.loss)
    for ours, theirs, truth in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert_accurate("gradient", ours, theirs, truth)


def test_options_of_the_trainer():
    made, inputs = model(), batch()
    shifted = {"shift_labels": inputs["labels"].roll(3, 1), "num_items_in_batch": torch.tensor(31)}
    expected, _ = step(made, **inputs, **shifted)
    install(made)
    got, _ = step(made, **inputs, **shifted)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(step(made, **inputs, num_valid=22)[0].loss, step(made, **inputs)[0].loss)


def test_on_and_off():
    made, inputs = model(), batch()
    kinds = [type(module) for module in made.modules()]
    made.eval()
    logits = made(**inputs).logits
    install(made)
    assert torch.equal(made(**inputs).logits, logits)  # in eval mode nothing differs
    made.train()
    assert torch.equal(made(inputs["input_ids"]).logits, logits)  # nor without labels
    again = install(made)
    assert (len(again), len(again.already)) == (0, 3)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied(**inputs).logits is None
    assert len(remove(made)) == 3
    assert len(remove(made)) == 0
    assert [type(module) for module in made.modules()] == kinds
    assert made.loss_function is ForCausalLMLoss
    assert torch.equal(made(**inputs).logits, logits)


def test_in_the_trainer(tmp_path):
    inputs = [{name: value[0] for name, value in batch().items()} for _ in range(8)]
    made = model()

    def losses(trained):
        options = {"output_dir": str(tmp_path), "max_steps": 3, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        arguments = transformers.TrainingArguments(
            **options, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, disable_tqdm=True
        )
        trainer = transformers.Trainer(trained, arguments, train_dataset=inputs)
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    theirs = losses(copy.deepcopy(made))
    install(made)
    ours = losses(made)
    assert len(ours) == 3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_with_lora():
    made, inputs = model(), batch()
    wrapped = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected, before = step(wrapped, **inputs)
    install(wrapped)
    got, after = step(wrapped, **inputs)
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_compiled():
    made, inputs = model(), batch()
    install(made)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager")
    torch.testing.assert_close(compiled(**inputs).loss, made(**inputs).loss)


def test_what_changes_its_logits_is_refused():
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM: final_logit_softcapping = 30.0"):
        install(model("Gemma2", head_dim=8))
    with pytest.raises(ValueError, match=r"GraniteForCausalLM: logits_scaling = 8.0"):
        install(model("Granite", logits_scaling=8.0))

    class Scaled(transformers.Qwen3ForCausalLM):
        """Scales its logits, and no configuration says so."""

        def forward(self, input_ids, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state) / 2
            loss = None if labels is None else self.loss_function(logits, labels, 64)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    made, inputs = Scaled(transformers.Qwen3Config(**SIZES)), batch()
    install(made)
    with pytest.raises(RuntimeError, match="changes its logits between head and loss"):
        made(**inputs)
    remove(made)
    assert made(**inputs).loss.isfinite()


def test_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        install("Qwen3")
    with pytest.raises(TypeError, match="Qwen3Model holds 0 models of transformers with an lm_head; expected one"):
        install(model().model)
    made = model()
    made.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="not transformers' own"):
        install(made)


def test_beside_a_patch():
    made = tiny_models.model("qwen3_vl")
    m4ov_kernels.patch(made, operators={"mrope_positions", "scatter_vision"})
    kinds = [type(module) for module in made.modules()]
    assert len(install(made)) == 3
    assert made(**tiny_models.padded(made, tiny_models.samples(made))).logits is None
    assert len(remove(made)) == 3
    assert [type(module) for module in made.modules()] == kinds
    m4ov_kernels.patch(made)
    assert len(install(made)) == 0
    with pytest.raises(ValueError, match=r"was patched; m4ov_kernels.unpatch takes that off"):
        remove(made)
