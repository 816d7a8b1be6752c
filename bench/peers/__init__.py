"""What our operators are compared with, by family. A peer that cannot run here is an ``Absent`` with the reason."""

from m4ov_bench.peers.activation import geglu, gelu, swiglu
from m4ov_bench.peers.attention import varlen_attention
from m4ov_bench.peers.base import Absent, Compiled, Peer
from m4ov_bench.peers.gemm import fp8_linear, int4_linear, int8_linear
from m4ov_bench.peers.head import linear_cross_entropy
from m4ov_bench.peers.moe import experts_block, grouped_linear, permute, route_topk, unpermute
from m4ov_bench.peers.norm import layer_norm, rms_norm
from m4ov_bench.peers.rope import qk_norm_mrope, vision_rope
from m4ov_bench.peers.rope_positions import get_rope_index
from m4ov_bench.peers.vision import deepstack_add, interpolate_position_embeddings, scatter_vision
from m4ov_bench.peers.vision_pixels import pack_patches

__all__ = [
    "Absent",
    "Compiled",
    "Peer",
    "deepstack_add",
    "experts_block",
    "fp8_linear",
    "geglu",
    "gelu",
    "get_rope_index",
    "grouped_linear",
    "int4_linear",
    "int8_linear",
    "interpolate_position_embeddings",
    "layer_norm",
    "linear_cross_entropy",
    "pack_patches",
    "permute",
    "qk_norm_mrope",
    "rms_norm",
    "route_topk",
    "scatter_vision",
    "swiglu",
    "unpermute",
    "varlen_attention",
    "vision_rope",
]
