"""Whether all layers of a model are what one native call can run: then a step of decoding is that call."""

from __future__ import annotations

from typing import Any

from torch import nn

from m4ov.generate.cache import Slab
from m4ov_kernels.attention import VARLEN_ATTENTION
from m4ov_kernels.nn import RMSNorm
from m4ov_kernels.nn.plain import is_plain


def native_step(text: Any, slab: Slab) -> Any:
    """A :class:`m4ov_kernels.decoding.native.DecodeStep` of a :class:`m4ov.models.qwen3_vl.text.TextModel` and a slab,
    for shared numerics; ``None`` where a module is not the plain one (a quantised or hooked linear, LoRA's, experts),
    or the compiled kernels do not serve the model: then the layers are called one by one.
    """
    table = text.embed_tokens
    implementation = VARLEN_ATTENTION.select(table.weight.device, table.weight.dtype)
    if implementation is None or implementation.backend != "native":
        return None
    from m4ov_kernels.attention.native import FEW_LANES
    from m4ov_kernels.decoding.native import DecodeStep

    config, first = text.config, text.layers[0].self_attn
    if config.num_attention_heads > FEW_LANES * config.num_key_value_heads or config.head_dim % 2:
        return None
    if not (is_plain(table, nn.Embedding) and table.max_norm is None):
        return None
    layers = [_tensors(layer, slab, index) for index, layer in enumerate(text.layers)]
    norms = [text.norm, *(norm for layer in text.layers for norm in _norms(layer))]
    eps = {norm.variance_epsilon if is_plain(norm, RMSNorm) and norm.numerics == "hf" else None for norm in norms}
    rotations = {(layer.self_attn.rotation.theta, layer.self_attn.scaling) for layer in text.layers}
    if any(layer is None for layer in layers) or len(eps) != 1 or None in eps or len(rotations) != 1:
        return None
    tensors = [table.weight, text.norm.weight, *(value for layer in layers for value in layer.values())]  # type: ignore[union-attr]
    if not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return None
    return DecodeStep(
        layers,  # type: ignore[arg-type]
        table.weight,
        text.norm.weight,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=config.head_dim,
        theta=float(first.rotation.theta),
        eps=float(text.norm.variance_epsilon),
        scale=first.scaling,
    )


def _norms(layer: Any) -> tuple[nn.Module, ...]:
    attention = layer.self_attn
    return layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm


def _tensors(layer: Any, slab: Slab, index: int) -> dict[str, Any] | None:
    """A layer's, by the names of ``DecodeStep``; ``None``: it holds something else than linears of its own."""
    attention, mlp = layer.self_attn, layer.mlp
    if layer.sparse:
        return None
    linears = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
    linears |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    if not all(is_plain(linear, nn.Linear) for linear in linears.values()):
        return None
    made: dict[str, Any] = {name: linear.weight for name, linear in linears.items()}
    made |= {f"{name}_bias": linear.bias for name, linear in linears.items()}
    names = ("input_norm", "post_norm", "q_norm", "k_norm")
    made |= {name: norm.weight for name, norm in zip(names, _norms(layer), strict=True)}
    return made | {"keys": slab.keys[index], "values": slab.values[index]}
