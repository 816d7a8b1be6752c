"""``patch_embed``: the convolution over patches as the matrix product that it is."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from m4ov_kernels import checks


def patch_embed(pixel_values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Projects flattened patches: a convolution whose stride is its kernel size, on inputs of exactly one kernel.

    A plain function over ``F.linear``, not a registered operator: nothing is fused that a library's matrix product does
    not have, so a kernel of ours could only be slower; PyTorch's gradients, autocast, ``torch.compile``, FSDP and
    DTensor sharding apply as they are. (Convolution libraries take the general road: pytorch#174051, 10 to 20 times
    slower.)

    Args:
        pixel_values: ``[N, K]``, or ``[N, C, T, P, P]`` with ``C·T·P·P = K``; a floating dtype. Converted to the dtype
            of ``weight``, as Hugging Face does.
        weight: ``[D, K]``, or the convolution's ``[D, C, T, P, P]``, bfloat16, float16, float32 or float64.
        bias: ``[D]``, dtype of ``weight``.

    Returns:
        ``[N, D]`` in the dtype of ``weight`` (under autocast: in autocast's).

    Saves for backward: what ``F.linear`` does, ``pixel_values`` and ``weight``.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the dtype of ``bias`` differs.
        ValueError: shapes or devices do not fit.

    Source: ViT, arXiv 2010.11929; the weight as Qwen2-VL's ``Conv3d`` holds it.
    """
    checks.float_tensor("patch_embed", "pixel_values", pixel_values)
    checks.float_tensor("patch_embed", "weight", weight)
    if weight.ndim not in (2, 5):
        checks.refuse(ValueError, "patch_embed", "weight", "[D, K] or [D, C, T, P, P]", checks.describe(weight))
    weight = weight.flatten(1)
    size = weight.shape[1]
    if (
        pixel_values.ndim not in (2, 5)
        or pixel_values.shape[1:].numel() != size
        or pixel_values.device != weight.device
    ):
        expected = f"[N, {size}] on {weight.device}, as weight"
        checks.refuse(ValueError, "patch_embed", "pixel_values", expected, checks.describe(pixel_values))
    if bias is not None:
        checks.float_tensor("patch_embed", "bias", bias)
        if bias.dtype is not weight.dtype:
            checks.refuse(TypeError, "patch_embed", "bias", f"{weight.dtype}, as weight", bias.dtype)
        if bias.shape != weight.shape[:1] or bias.device != weight.device:
            expected = f"[{weight.shape[0]}] on {weight.device}, as weight"
            checks.refuse(ValueError, "patch_embed", "bias", expected, checks.describe(bias))
    return F.linear(pixel_values.flatten(1).to(weight.dtype), weight, bias)
