"""The compiled loops that benchmarks are held against: they read every byte, and count what they do."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
import torch

from m4ov_bench import measure
from m4ov_kernels.dispatch import native_extension

extension = native_extension()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the compiled extension is not there")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_sees_every_byte(isa, threads):
    for size in (0, 1, 7, 8, 63, 64, 65, 4095, 70_001, 1 << 20, (5 << 20) + 77):
        raw = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)[3:]  # at no even address
        words = np.pad(raw.numpy(), (0, -size % 8)).view(np.uint64)
        expected = functools.reduce(operator.xor, words.tolist(), 0)
        assert extension.read_bytes(raw.data_ptr(), size, threads) == expected


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_dot_products_are_counted(isa, kind):
    one = extension.dot_loop(kind, 1, 1)
    assert one > 0
    assert extension.dot_loop(kind, 50, 1) == 50 * one
    assert extension.dot_loop(kind, 50, 2) == 100 * one
    call, made = measure.dot_products(kind, 1e6)
    assert call(0) == made
    assert 0.5e6 < made <= 1e6


def test_dot_products_of_nothing_known():
    with pytest.raises(ValueError, match="expected int8 or bf16, not 'int4'"):
        extension.dot_loop("int4", 1, 1)
