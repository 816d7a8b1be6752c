"""What our operators are compared with, by family. A peer that cannot run here is an ``Absent`` with the reason."""

from m4ov_bench.peers.activation import swiglu
from m4ov_bench.peers.attention import varlen_attention
from m4ov_bench.peers.base import Absent, Compiled, Peer
from m4ov_bench.peers.head import linear_cross_entropy
from m4ov_bench.peers.norm import rms_norm
from m4ov_bench.peers.rope import get_rope_index

__all__ = [
    "Absent",
    "Compiled",
    "Peer",
    "get_rope_index",
    "linear_cross_entropy",
    "rms_norm",
    "swiglu",
    "varlen_attention",
]
