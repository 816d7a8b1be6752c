"""Trains and serves vision-language models with m4ov_kernels and PyTorch."""
