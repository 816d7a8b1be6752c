"""Making batches, on the host: which samples go together (``pack_sequences``), and what they become
(``PackedBatch``)."""

from __future__ import annotations

from m4ov_kernels.packing.batch import PackedBatch, Sample
from m4ov_kernels.packing.sequences import Bins, pack_sequences
from m4ov_kernels.packing.vision import Patches, VisionInputs

__all__ = ["Bins", "PackedBatch", "Patches", "Sample", "VisionInputs", "pack_sequences"]
