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
from .steps import assert_same_step, in_float64, step

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


@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "Mistral", "Qwen2"])
def test_the_models_own_loss(kind):
    made, inputs = model(kind), batch()
    plain, exact = step(made, inputs), in_float64(made, inputs)
    assert len(install(made)) == 3
    assert made(**inputs).logits is None
    assert_same_step(step(made, inputs), plain, exact)


def test_in_bf16():
    """Logits are rounded as the model's are: no further from float64 than twice what they cost there."""
    made, inputs = model(), batch()
    exact = in_float64(made.bfloat16(), inputs)()
    plain = step(made, inputs)
    install(made)
    loss, gradients = step(made, inputs)
    torch.testing.assert_close(loss, plain[0], rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        error, allowed = (float((found[name] - exact[1][name]).norm()) for found in (gradients, plain[1]))
        assert error <= 2 * allowed + 2**-7 * float(exact[1][name].norm()), (name, gradient.dtype)


def test_options_of_the_trainer():
    made, inputs = model(), batch()
    shifted = {"shift_labels": inputs["labels"].roll(3, 1), "num_items_in_batch": torch.tensor(31)}
    expected = step(made, inputs, **shifted)
    install(made)
    assert_same_step(step(made, inputs, **shifted), expected)
    assert_same_step(step(made, inputs, num_valid=22), step(made, inputs))


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
    expected, exact = step(wrapped, inputs), in_float64(wrapped, inputs)
    install(wrapped)
    assert wrapped(**inputs).logits is None
    assert_same_step(step(wrapped, inputs), expected, exact)


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
