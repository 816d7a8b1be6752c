"""Parallel training: each kind in a file of its own."""
