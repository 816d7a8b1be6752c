"""The operators in Hugging Face's ``Qwen3VLForConditionalGeneration`` (transformers 5.14 and newer).

What each group replaces:

``norm``         every text RMSNorm (``q_norm`` and ``k_norm`` too), rounding where Hugging Face rounds; in the decoder
                 layer the residual add after attention is fused with the norm that follows it.
``mlp``          the text MLP's activation.
``patch_embed``  the ``Conv3d``, run as the matrix product that it is.
``loss``         in training mode, a call with ``labels`` computes the loss from hidden states: logits are never whole
                 in memory and ``outputs.logits`` is ``None``. In eval mode, or without labels, logits are as they were.
                 ``num_items_in_batch`` and ``shift_labels`` are honoured on every version (transformers 5.14 drops
                 both). ``num_valid=`` says how many shifted labels count, if the host knows (spares work on a GPU).
``attention``    implementation ``sdpa`` only (another that was chosen stays): ``m4ov_kernels.varlen_attention`` inside
                 the samples of a packed row and inside the images of the vision tower, without a mask over all pairs of
                 tokens and without a loop over images; on the CPU in unpacked rows without mask and cache too. What has
                 a mask, a cache or dropout takes PyTorch's attention.

**Packed rows.** Several samples in one row ``[1, T]``; either of

* ``position_ids [4, 1, T]``, row 0 the text positions, restarting at 0 with each sample, rows 1 to 3 the M-RoPE
  positions of each sample for itself; no ``attention_mask``, no ``past_key_values``. transformers reads this too, but
  only with ``use_cache=False``: with the configuration's ``use_cache=True`` it lets samples see each other. Patched,
  samples are kept apart either way, and no cache is built. More rows ``[4, B, T]`` work alike.
* ``cu_seq_lens_q [N + 1]`` (transformers' name for its flash attention; on the CPU it costs no synchronisation), with
  ``position_ids`` of three or four rows. It wins over what the positions say; ``cu_seq_lens_k`` and ``max_length_*``
  are not needed.

``labels`` are not shifted; the first label of each sample should be ``-100``, or the last token of one sample is
trained on the first of the next. Under ``torch.compile`` only ``cu_seq_lens_q`` avoids the mask. ``pixel_values`` and
``image_grid_thw`` hold the images of all samples, in order.

A patch changes classes (to subclasses of the same name), two hooks, ``config.text_config`` and ``config.vision_config``
(``_attn_implementation``) and ``model.loss_function``, all through what transformers and PyTorch offer for it; models
that share the configuration object share the attention setting, and attend as before.
"""

from __future__ import annotations

import inspect
import threading
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

from m4ov_kernels.nn import CausalLMHead, PatchEmbed, RMSNorm, SwiGLUMLP
from m4ov_kernels.patches import packed_attention
from m4ov_kernels.patches.classes import Swap, apply, find_swaps
from m4ov_kernels.patches.report import PatchReport, Replacement

GROUPS = ("norm", "mlp", "loss", "patch_embed", "attention")


class Qwen3VLTextRMSNorm(RMSNorm, hf.Qwen3VLTextRMSNorm):  # type: ignore[misc]
    """transformers' module with the operator's forward."""


class Qwen3VLTextMLP(SwiGLUMLP, hf.Qwen3VLTextMLP):
    """transformers' module with the operator's forward."""


class Qwen3VLVisionPatchEmbed(PatchEmbed, hf.Qwen3VLVisionPatchEmbed):
    """transformers' module with the matrix product's forward."""


class Qwen3VLTextDecoderLayer(hf.Qwen3VLTextDecoderLayer):
    """transformers' layer with the first residual add fused with the norm that follows it."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        attention, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        normed, residual = self.post_attention_layernorm(attention, residual=hidden_states)
        return residual + self.mlp(normed)


class _LossRequest(threading.local):
    """What the model's forward, on this thread, asks of its head."""

    arguments: dict[str, Any] | None = None


_request = _LossRequest()


class LMHead(CausalLMHead):
    """The head; inside a forward that wants only the loss it returns that.

    Here, not in ``loss_function``, because FSDP gathers a module's weight for its own forward and no longer.
    """

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        arguments, _request.arguments = _request.arguments, None
        return super().forward(input) if arguments is None else super().forward(input, **arguments)


def causal_lm_loss_function(logits: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """transformers' loss; passes on what :class:`LMHead` already made a loss of."""
    return logits if logits.ndim == 0 else ForCausalLMLoss(logits, labels, *args, **kwargs)


class Qwen3VLForConditionalGeneration(hf.Qwen3VLForConditionalGeneration):
    """transformers' model; in training, with labels, the loss is computed without logits."""

    @wraps(hf.Qwen3VLForConditionalGeneration.forward)
    def forward(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> Any:
        kwargs.update(zip(_FORWARD_PARAMETERS, args, strict=False))
        num_valid = kwargs.pop("num_valid", None)
        wanted = self.training and kwargs.get("labels") is not None
        if not wanted or not isinstance(self.lm_head, LMHead) or self.loss_function is not causal_lm_loss_function:
            return super().forward(**kwargs)
        return_dict = kwargs.pop("return_dict", None)
        _request.arguments = {
            "labels": kwargs["labels"],
            "num_valid": num_valid,
            **{name: kwargs[name] for name in ("shift_labels", "num_items_in_batch", "ignore_index") if name in kwargs},
        }
        try:
            outputs = super().forward(**kwargs, return_dict=True)
        finally:
            _request.arguments = None
        outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


_FORWARD_PARAMETERS = tuple(inspect.signature(hf.Qwen3VLForConditionalGeneration.forward).parameters)[1:]


_LAYER_CLASSES: dict[str, dict[type, type]] = {
    "norm": {
        hf.Qwen3VLTextRMSNorm: Qwen3VLTextRMSNorm,
        hf.Qwen3VLTextDecoderLayer: Qwen3VLTextDecoderLayer,
    },
    "mlp": {hf.Qwen3VLTextMLP: Qwen3VLTextMLP},
    "patch_embed": {hf.Qwen3VLVisionPatchEmbed: Qwen3VLVisionPatchEmbed},
}
_MODEL_CLASSES: dict[type, type] = {hf.Qwen3VLForConditionalGeneration: Qwen3VLForConditionalGeneration}
_HEAD_CLASSES: dict[type, type] = {nn.Linear: LMHead}
_LOSSES = ("transformers.ForCausalLMLoss", "m4ov_kernels.linear_cross_entropy")


def patch(model: Any, groups: tuple[str, ...]) -> PatchReport:
    """Replace the given groups. All is checked before anything is changed."""
    swaps: list[Swap] = []
    already: list[Replacement] = []
    skipped = [(group, "switched off") for group in GROUPS if group not in groups]
    for group in groups:
        reason = _unfit(model, group)
        if reason is not None:
            skipped.append((group, reason))
            continue
        modules = model.named_modules()
        found = [find_swaps(group, modules, _LAYER_CLASSES[group])] if group in _LAYER_CLASSES else []
        if group == "loss":
            found += [
                find_swaps(group, [("", model)], _MODEL_CLASSES),
                find_swaps(group, [("lm_head", model.lm_head)], _HEAD_CLASSES),
            ]
        for new, old in found:
            swaps += new
            already += old
    replaced = [swap.entry for swap in swaps]
    apply(swaps)
    if "loss" in groups and _unfit(model, "loss") is None:
        entry = Replacement(
            "loss", "loss_function", "transformers.ForCausalLMLoss", "m4ov_kernels.linear_cross_entropy"
        )
        (already if model.loss_function is causal_lm_loss_function else replaced).append(entry)
        model.loss_function = causal_lm_loss_function
    if "attention" in groups:
        attention = packed_attention.install(model, model.model.language_model, model.model.visual)
        replaced, already, skipped = (a + b for a, b in zip((replaced, already, skipped), attention, strict=True))  # type: ignore
    return PatchReport(type(model).__name__, tuple(replaced), tuple(already), tuple(skipped))


def unpatch(model: Any) -> PatchReport:
    """Restore every class, hook and setting. All is checked before anything is changed."""
    classes = {
        new: old for table in (*_LAYER_CLASSES.values(), _MODEL_CLASSES, _HEAD_CLASSES) for old, new in table.items()
    }
    groups = {new: group for group, table in _LAYER_CLASSES.items() for new in table.values()}
    swaps = []
    for path, module in model.named_modules():
        found, _ = find_swaps(groups.get(type(module), "loss"), [(path, module)], classes)
        swaps += found
    apply(swaps)
    restored = [swap.entry for swap in swaps]
    if model.loss_function is causal_lm_loss_function:
        del model._loss_function  # `loss_function` has no deleter; only the default was ever replaced
        restored.append(Replacement("loss", "loss_function", *reversed(_LOSSES)))
    restored += packed_attention.remove(model, model.model.language_model, model.model.visual)
    return PatchReport(type(model).__name__, tuple(restored), restored=True)


def _unfit(model: Any, group: str) -> str | None:
    """Why a group cannot be replaced in this model, if so."""
    if group == "mlp" and model.config.text_config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {model.config.text_config.hidden_act!r}, not 'silu'"
    if group == "patch_embed" and type(model.model.visual.patch_embed.proj) is not nn.Conv3d:
        return f"its projection is a {type(model.model.visual.patch_embed.proj).__name__}, not a Conv3d"
    if group == "loss" and not isinstance(model.lm_head, LMHead) and type(model.lm_head) is not nn.Linear:
        return f"lm_head is a {type(model.lm_head).__name__}, not a Linear"
    if group == "loss" and model.loss_function not in (ForCausalLMLoss, causal_lm_loss_function):
        return (
            f"loss_function is {getattr(model.loss_function, '__name__', model.loss_function)!r}, not transformers' own"
        )
    return None
