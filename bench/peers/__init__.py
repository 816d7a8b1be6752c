"""What our operators are compared with, by family. A peer that cannot run here is an ``Absent`` with the reason."""

from m4ov_bench.peers.activation import swiglu
from m4ov_bench.peers.attention import varlen_attention
from m4ov_bench.peers.base import Absent, Compiled, Peer
from m4ov_bench.peers.head import linear_cross_entropy
from m4ov_bench.peers.norm import rms_norm
from m4ov_bench.peers.rope import get_rope_index
from m4ov_bench.peers.vision import deepstack_add, interpolate_position_embeddings, scatter_vision

__all__ = [
    "Absent",
    "Compiled",
    "Peer",
    "deepstack_add",
    "get_rope_index",
    "interpolate_position_embeddings",
    "linear_cross_entropy",
    "rms_norm",
    "scatter_vision",
    "swiglu",
    "varlen_attention",
]
