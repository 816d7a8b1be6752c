"""How the options of a quantised linear are numbered, in ``csrc/gemm/kernels.h`` and in the Triton kernels alike."""

KINDS = {"int4": 0, "int8": 1, "fp8": 2}
ACTIVATIONS = {"bf16": 0, "int8": 1, "fp8": 2}
EPILOGUES = {"none": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}
