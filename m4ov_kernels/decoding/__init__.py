"""A step of decoding as two calls of compiled kernels: all layers of a language model, and the draw of tokens.

No operators: compositions of those that there are, for :mod:`m4ov.generate`, without Python between them. What they
compute is what the model's packed forward computes inside :func:`m4ov_kernels.invariant`, to the bit.
"""
