"""Model FLOPs of Qwen3-VL on a packed batch: what the definition needs, whoever computes it and however often."""

from __future__ import annotations

from typing import Any

from m4ov_kernels.packing import PackedBatch, VisionInputs


def training_flops(config: Any, batch: PackedBatch) -> float:
    """Forward and backward of one batch: three times the forward's matrix products, two FLOPs a multiplication.

    Attention counts what it sees: a token of text itself and what stands before it in its sample, a patch its image
    (its frame of a video). The head counts at tokens with a label. Norms, activations, embeddings and anything
    recomputed do not count.

    Args:
        config: transformers' ``Qwen3VLConfig`` or ``Qwen3VLMoeConfig``, or one with the same names.
    """
    text = config.text_config
    hidden, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = hidden * (2 * queries + 2 * keys)
    count, experts = text.num_hidden_layers, getattr(text, "num_experts", 0) or 0
    dense = 3 * hidden * text.intermediate_size
    sparse = 0 if not experts else 3 * hidden * text.moe_intermediate_size * text.num_experts_per_tok + hidden * experts
    step, named = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", ())
    sparse_layers = sum((layer + 1) % step == 0 and layer not in named for layer in range(count)) if experts else 0
    mlps = sparse_layers * sparse + (count - sparse_layers) * dense
    seen = sum(length * (length + 1) // 2 for length in batch.lengths)
    layers = batch.tokens * (count * projections + mlps) + count * seen * 2 * queries
    total = layers + batch.num_labels * hidden * text.vocab_size
    for vision in (batch.images, batch.videos):
        if vision is not None:
            total += _vision(config.vision_config, vision)
    return 3.0 * 2.0 * total


def _vision(config: Any, vision: VisionInputs) -> float:
    """Multiplications of the tower's forward."""
    hidden = config.hidden_size
    patches = sum(frames * height * width for frames, height, width in vision.grids)
    seen = sum(frames * (height * width) ** 2 for frames, height, width in vision.grids)
    embedding = config.in_channels * config.temporal_patch_size * config.patch_size**2 * hidden
    block = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    merged = config.spatial_merge_size**2 * hidden
    mergers = (1 + len(config.deepstack_visual_indexes)) * (merged**2 + merged * config.out_hidden_size)
    tower = patches * (embedding + config.depth * block) + seen * config.depth * 2 * hidden
    return tower + patches // config.spatial_merge_size**2 * mergers
