"""What our operators are compared with, by family. A peer that cannot run here is an ``Absent`` with the reason."""

from m4ov_bench.peers.activation import swiglu
from m4ov_bench.peers.attention import varlen_attention
from m4ov_bench.peers.base import Absent, Compiled, Peer
from m4ov_bench.peers.head import linear_cross_entropy
from m4ov_bench.peers.norm import rms_norm
from m4ov_bench.peers.vision_pixels import pack_patches

__all__ = [
    "Absent",
    "Compiled",
    "Peer",
    "linear_cross_entropy",
    "pack_patches",
    "rms_norm",
    "swiglu",
    "varlen_attention",
]
