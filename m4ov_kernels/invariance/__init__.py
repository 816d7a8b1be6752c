"""``invariant``: a whole model whose rows keep their bits, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from m4ov_kernels.dispatch import requesting_invariance
from m4ov_kernels.gemm import invariant_linear
from m4ov_kernels.invariance.attention import scaled_dot_product_attention

__all__ = ["checkpoint_contexts", "invariant"]


@contextmanager
def invariant() -> Iterator[None]:
    """In this block, on this thread: a row's bits depend on the row, the rows that it attends to and the weights alone,
    so that sampling and training, a batch and its parts, padded or packed, compute the same log-probabilities.

    ``F.linear`` (and so every ``nn.Linear``, a patch embedding, LoRA's layers) is
    :func:`m4ov_kernels.gemm.invariant_linear`; ``F.scaled_dot_product_attention`` is
    :func:`m4ov_kernels.varlen_attention` over the tokens that its mask shows; our operators are asked for
    ``invariant=True``. Any other product of matrices is refused: attention and dropout that these two cannot express,
    ``matmul``, convolutions, ``torch.compile``, float64, a GPU.

    For the CPU. Kernels of other packages are not seen. What stays PyTorch's own is elementwise or a gather; its norms,
    softmax and reductions over a row are left to it, and no promise of ours: patch the model
    (:func:`m4ov_kernels.patch`). A row's positions are part of the row: a model that counts padding as positions gives
    another row.

    The backward may run outside. Where it computes activations again they need the block too, which PyTorch leaves
    then: give ``torch.utils.checkpoint`` (or ``gradient_checkpointing_kwargs``) ``context_fn=checkpoint_contexts``;
    without it PyTorch raises, because other tensors are saved. The gradients of hidden states keep their bits; those of
    parameters are sums over the batch.

    Raises:
        RuntimeError: from the call that cannot be served, naming it.
    """
    with requesting_invariance(), _Invariant():
        yield


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint`` inside :func:`invariant`: for the forward, and for when it runs
    again."""
    return nullcontext(), invariant()


class _Invariant(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return invariant_linear(input, weight, bias)


def _attention(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **kwargs)


def _product(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A matrix product: only one in which nothing is summed, as in an outer product of positions and frequencies."""
    matrices = [value for value in args if isinstance(value, Tensor)]
    name = getattr(func, "__name__", str(func))
    if name in ("matmul", "mm", "bmm", "__matmul__") and len(matrices) == 2 and matrices[0].shape[-1:] == (1,):
        return func(*args, **kwargs)
    raise RuntimeError(
        f"invariant(): {name} of {', '.join(str(list(value.shape)) for value in matrices)} is PyTorch's, whose bits "
        "depend on the batch; use F.linear or F.scaled_dot_product_attention"
    )


# Under every name that it has.
_PRODUCTS = [
    getattr(place, name)
    for place in (torch, torch.Tensor, torch.linalg, F)
    for name in (
        *(
            "matmul",
            "__matmul__",
            "__rmatmul__",
            "mm",
            "bmm",
            "addmm",
            "baddbmm",
            "addbmm",
            "mv",
            "addmv",
            "dot",
            "vdot",
        ),
        *("inner", "vecdot", "einsum", "tensordot", "chain_matmul", "multi_dot", "bilinear", "cdist"),
        *(
            "grouped_mm",
            "_grouped_mm",
            "scaled_mm",
            "_scaled_mm",
            "_scaled_grouped_mm",
            "_int_mm",
            "_weight_int4pack_mm",
        ),
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"),
    )
    if hasattr(place, name)
]
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_PRODUCTS, _product),
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
