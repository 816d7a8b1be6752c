"""``scatter_vision`` and ``deepstack_add``: vision features into the rows of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m4ov_kernels import checks
from m4ov_kernels.dispatch import Operator, is_compiling
from m4ov_kernels.vision import reference
from m4ov_kernels.vision.checks import check_positions


def scatter_vision(inputs_embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """``inputs_embeds`` with ``features[n]`` in row ``positions[n]``. Without a host synchronisation.

    Args:
        inputs_embeds: ``[..., T, D]`` (bfloat16, float16, float32 or float64); any strides. It is not changed.
        features: ``[N, D]``, same dtype and device.
        positions: ``[N]`` int64, same device: rows of ``inputs_embeds``, counted over all its leading dimensions; each
            in ``[0, rows)`` and only once, in any order.

    Returns:
        A contiguous tensor of the shape and dtype of ``inputs_embeds``. The values are copied bit for bit.

    Saves for backward: ``positions``. The gradient of ``inputs_embeds`` is zero in the replaced rows; what needs no
    gradient costs nothing.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices differ, or (CPU) a position is out of range or there twice: names the first. On a
            GPU the features of such a position go nowhere, a row that two claim is NaN, and
            :func:`m4ov_kernels.check` raises the error.

    Source: the token merge of LLaVA-like models (arXiv 2304.08485); Hugging Face computes it with ``masked_scatter``.
    """
    _check("scatter_vision", "inputs_embeds", inputs_embeds, features, positions)
    implementation = SCATTER_VISION.select(inputs_embeds.device, inputs_embeds.dtype)
    if implementation is None:
        _check_values("scatter_vision", inputs_embeds, positions)
        return reference.scatter_vision(inputs_embeds, features, positions)
    result: Tensor = SCATTER_VISION(implementation, inputs_embeds, features, positions)
    return result


def deepstack_add(hidden_states: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """``hidden_states`` with ``features[n]`` added to row ``positions[n]``. Without a host synchronisation.

    Args:
        hidden_states: ``[..., T, D]`` (bfloat16, float16, float32 or float64); any strides. It is not changed.
        features: ``[N, D]``, same dtype and device.
        positions: ``[N]`` int64, same device: rows of ``hidden_states``, counted over all its leading dimensions; each
            in ``[0, rows)`` and only once, in any order.

    Returns:
        A contiguous tensor of the shape and dtype of ``hidden_states``; a sum is rounded once.

    Saves for backward: ``positions``. The gradient of ``hidden_states`` is that of the output, itself.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: shapes or devices differ, or (CPU) a position is out of range or there twice: names the first. On a
            GPU the features of such a position go nowhere, a row that two claim is NaN, and
            :func:`m4ov_kernels.check` raises the error.

    Source: DeepStack, arXiv 2406.04334, as Qwen3-VL has it: at the visual positions, after the first layers.
    """
    _check("deepstack_add", "hidden_states", hidden_states, features, positions)
    implementation = DEEPSTACK_ADD.select(hidden_states.device, hidden_states.dtype)
    if implementation is None:
        _check_values("deepstack_add", hidden_states, positions)
        return reference.deepstack_add(hidden_states, features, positions)
    result: Tensor = DEEPSTACK_ADD(implementation, hidden_states, features, positions)
    return result


def _check(operator: str, name: str, base: Tensor, features: Tensor, positions: Tensor) -> None:
    checks.float_tensor(operator, name, base)
    checks.float_tensor(operator, "features", features)
    if base.ndim < 2:
        checks.refuse(ValueError, operator, name, "[..., T, D]", checks.describe(base))
    if features.dtype is not base.dtype:
        checks.refuse(TypeError, operator, "features", f"{base.dtype}, as {name}", features.dtype)
    if features.ndim != 2 or features.shape[1] != base.shape[-1] or features.device != base.device:
        expected = f"[N, {base.shape[-1]}] on {base.device}, as {name}"
        checks.refuse(ValueError, operator, "features", expected, checks.describe(features))
    if not isinstance(positions, Tensor) or positions.dtype is not torch.int64 or positions.layout is not torch.strided:
        expected = "a dense int64 tensor"
        came = f"layout {positions.layout}" if getattr(positions, "is_sparse", False) else checks.describe(positions)
        checks.refuse(TypeError, operator, "positions", expected, came)
    if positions.shape != features.shape[:1] or positions.device != base.device:
        expected = f"[{features.shape[0]}] on {base.device}, one for each row of features"
        checks.refuse(ValueError, operator, "positions", expected, checks.describe(positions))


def _check_values(operator: str, base: Tensor, positions: Tensor) -> None:
    """Before the reference; kernels look themselves."""
    if positions.device.type == "cpu" and not is_compiling():
        check_positions(operator, positions, base.shape[:-1].numel())


def _fwd_fake(base: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _scatter_bwd_fake(
    grad_output: Tensor, positions: Tensor, need_inputs_embeds: bool, need_features: bool
) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], grad_output.shape[-1])
    grad_inputs = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
    return (
        grad_inputs if need_inputs_embeds else grad_output.new_empty(0),
        grad_output.new_empty(shape if need_features else 0),
    )


def _scatter_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    grad_inputs, grad_features = bwd(grads[0], positions, needs[0], needs[1])
    return grad_inputs if needs[0] else None, grad_features if needs[1] else None, None


def _add_bwd_fake(grad_output: Tensor, positions: Tensor) -> Tensor:
    return grad_output.new_empty((positions.shape[0], grad_output.shape[-1]))


def _add_backward(ctx: Any, needs: Any, bwd: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    return grads[0] if needs[0] else None, bwd(grads[0], positions) if needs[1] else None, None


SCATTER_VISION = Operator(
    "vision",
    "scatter_vision",
    fwd_schema="(Tensor inputs_embeds, Tensor features, Tensor positions) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor positions, bool need_inputs_embeds, bool need_features)"
    " -> (Tensor grad_inputs_embeds, Tensor grad_features)",
    fwd_fake=_fwd_fake,
    bwd_fake=_scatter_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_scatter_backward,
)
DEEPSTACK_ADD = Operator(
    "vision",
    "deepstack_add",
    fwd_schema="(Tensor hidden_states, Tensor features, Tensor positions) -> Tensor",
    bwd_schema="(Tensor grad_output, Tensor positions) -> Tensor",
    fwd_fake=_fwd_fake,
    bwd_fake=_add_bwd_fake,
    results=lambda *_: 1,
    setup_context=_setup_context,
    backward=_add_backward,
)
