"""Calls of ``linear_kl`` and of its raw kernels, for ``test_dispatch.py``."""

from __future__ import annotations

import torch

from m4ov_kernels.head import linear_kl


def case(dtype=torch.float32):
    tensors = [torch.randn(*shape, dtype=dtype) * 0.3 for shape in ((6, 16), (11, 16), (11,))]
    other, other_weight = torch.randn(6, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    mask = torch.tensor([True, True, False, True, True, True])

    def function(h, w, b):
        return linear_kl(h, w, other, other_weight, bias=b, kind="jsd", temperature=0.7, mask=mask)

    return function, tensors


TWO_HEADS = (torch.randn(5, 8), torch.randn(7, 8), torch.randn(5, 3), torch.randn(7, 3))
RAW = {
    "linear_kl_fwd": [
        (*TWO_HEADS, None, None, None, "forward", 1.0, None, False),
        (
            *TWO_HEADS,
            torch.randn(7),
            torch.randn(7),
            torch.tensor([True, False, True, True, False]),
            "jsd",
            0.5,
            3,
            True,
        ),
        (*(tensor.bfloat16() for tensor in TWO_HEADS), None, torch.randn(7).bfloat16(), None, "reverse", 2.0, 5, False),
    ],
    "linear_kl_bwd": [
        (
            torch.randn(5),
            *TWO_HEADS,
            None,
            None,
            None,
            torch.rand(5, 5),
            "forward",
            1.0,
            None,
            False,
            True,
            True,
            False,
        ),
        (
            torch.randn(5),
            *TWO_HEADS,
            *torch.randn(2, 7),
            torch.tensor([True, False, True, True, False]),
            torch.rand(5, 5),
            *("jsd", 0.5, 3, True, True, False, True),
        ),
        (
            torch.randn(5),
            *TWO_HEADS,
            None,
            None,
            None,
            torch.rand(5, 5),
            "reverse",
            1.0,
            None,
            False,
            False,
            True,
            True,
        ),
    ],
}
