"""Readers and writers of the formats in which checkpoints hold quantised weights: one file each, and a registry."""
