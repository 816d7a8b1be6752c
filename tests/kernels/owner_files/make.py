"""Makes the files of this folder with the owners' own libraries: ``python make.py OWNER`` where that is installed.

Each file is one weight as its owner's library stores it; under ``expected`` what that library dequantises it to; in the
metadata the config that the library writes, its name and its version. The table in the README of
``m4ov_kernels/gemm/weights`` says which versions made the files that are committed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent
PREFIX = "model.layers.0.mlp.down_proj"


def save(owner: str, case: str, tensors: dict[str, Tensor], config: Any, expected: Tensor | None = None) -> None:
    out = {f"{PREFIX}.{name}": tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if expected is not None:
        out["expected"] = expected.contiguous().clone()
    metadata = {"owner": owner, "version": version(owner), "config": json.dumps(config, default=str)}
    save_file(out, FOLDER / f"{case}.safetensors", metadata)
    print(case, {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in out.items()})


def weight(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(N, K) * torch.rand(N, 1)).to(dtype)


def compressed_tensors() -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    activations = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    int8 = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True)
    cases: dict[str, tuple[int, int, str, QuantizationArgs | None, dict[str, Any]]] = {
        "int4-symmetric": (12, 128, "pack-quantized", None, {"num_bits": 4, "strategy": "group", "group_size": 64}),
        "int4-asymmetric": (
            13,
            96,
            "pack-quantized",
            None,
            {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        "int4-channel": (5, 43, "pack-quantized", None, {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        "int8-channel": (6, 43, "int-quantized", int8, {"num_bits": 8, "strategy": "channel"}),
        "fp8-tensor": (6, 43, "float-quantized", activations, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8-channel": (6, 43, "float-quantized", activations, {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8-block": (
            3,
            130,
            "float-quantized",
            activations,
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        ),
    }
    for case, (N, K, stored, inputs, arguments) in cases.items():
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs, format=stored)
        value = weight(N, K)
        blocks = value
        if case == "fp8-block":
            blocks = torch.nn.functional.pad(value, (0, 126, 0, 125)).view(1, 128, 2, 128).transpose(1, 2)
            low, high = blocks.amin((2, 3)), blocks.amax((2, 3))
        elif arguments["strategy"] == "tensor":
            low, high = value.amin(), value.amax()
        else:
            groups = value.unflatten(1, (-1, arguments.get("group_size", K)))
            low, high = groups.amin(2), groups.amax(2)
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": value, "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(stored)
        compressed = compressor.compress(state, scheme)
        expected = compressor.decompress(compressed, scheme)["weight"]
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=stored, quantization_status="compressed", ignore=["lm_head"]
        ).model_dump(mode="json")
        save("compressed-tensors", f"compressed-tensors-{case}", compressed, config, expected)


def compressed_tensors_actorder() -> None:
    """0.12.2 or another version that still has actorder "group"."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True, actorder="group")
    value, g_idx = weight(10, 128), (torch.arange(128) // 32)[torch.randperm(128)].int()
    groups = value[:, torch.argsort(g_idx, stable=True)].unflatten(1, (-1, 32))
    scale = (groups.abs().amax(2).float() / 7.5).to(torch.bfloat16)
    compressor = PackedQuantizationCompressor()
    compressed = compressor.compress_weight(value, scale, args, zero_point=torch.zeros_like(scale), g_idx=g_idx)
    compressed |= {"weight_scale": scale, "weight_g_idx": g_idx}
    expected = compressor.decompress_weight(compressed, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=["lm_head"])
    save("compressed-tensors", "compressed-tensors-int4-actorder", compressed, config.model_dump(mode="json"), expected)


def modelopt() -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.quant_utils import from_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor
    from transformers import LlamaConfig, LlamaForCausalLM

    awq = json.loads(json.dumps(mtq.INT4_AWQ_CFG).replace('"-1": 128', '"-1": 32'))
    for entry in awq["quant_cfg"] if isinstance(awq["quant_cfg"], list) else awq["quant_cfg"].values():
        for part in entry.get("cfg", entry), entry:
            if isinstance(part, dict) and isinstance(part.get("block_sizes"), dict):
                part["block_sizes"] = {(int(k) if k == "-1" else k): v for k, v in part["block_sizes"].items()}
    for case, config in (
        ("fp8", mtq.FP8_DEFAULT_CFG),
        ("fp8-pb-wo", mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG),
        ("w4a16-awq", awq),
    ):
        sizes = {"hidden_size": 32, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
        small = LlamaConfig(num_hidden_layers=1, vocab_size=32, architectures=["LlamaForCausalLM"], **sizes)
        model = LlamaForCausalLM(small).to(torch.bfloat16)
        ids = torch.randint(0, 32, (2, 16))
        mtq.quantize(model, config, forward_loop=lambda m, ids=ids: m(ids))
        linear = model.get_submodule(PREFIX)
        fake = linear.weight_quantizer(linear.weight.float()).detach()
        with tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(model, export_dir=folder)
            tensors = load_file(f"{folder}/model.safetensors")
            written = json.loads(Path(folder, "hf_quant_config.json").read_text())
        mine = {name.removeprefix(f"{PREFIX}."): t for name, t in tensors.items() if name.startswith(f"{PREFIX}.")}
        value, scale = mine["weight"], mine["weight_scale"]
        if case == "fp8":
            expected = from_quantized_weight(value, scale, "fp8", torch.float32)
        elif case == "fp8-pb-wo":
            wrapped = FP8QTensor(value.shape, torch.float32, value)
            grid = scale.reshape(-(-value.shape[0] // 128), -(-value.shape[1] // 128))
            expected = wrapped.dequantize(torch.float32, scale=grid, block_sizes={-1: 128, -2: 128})
        else:
            expected = fake
        save("nvidia-modelopt", f"modelopt-{case}", mine, written, expected)


def autoawq() -> None:
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    for case, N, K, group in (("group", 32, 64, 32), ("row", 64, 40, -1)):
        linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float16)
        linear.weight.data = weight(N, K, torch.float16)
        groups = linear.weight.data.float().unflatten(1, (-1, K if group == -1 else group))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-torch.round(low / scales)).clamp(0, 15)
        # As AwqQuantizer does before it packs: the weight is its own pseudo-quantisation.
        codes = (torch.round(groups / scales[..., None].float()) + zeros[..., None]).clamp(0, 15)
        linear.weight.data = ((codes - zeros[..., None]) * scales[..., None].float()).flatten(1).half()
        size = K if group == -1 else group
        made = WQLinear_GEMM.from_linear(linear, 4, size, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        config = AwqConfig(q_group_size=group).to_transformers_dict()
        expected = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, size).t()
        save("autoawq", f"autoawq-{case}", dict(made.state_dict()), config, expected)


def gptqmodel() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for case, act_order, symmetric, form in (
        ("v1-symmetric", False, True, "gptq"),
        ("v1-actorder", True, True, "gptq"),
        ("v1-asymmetric", False, False, "gptq"),
        ("v2-actorder-asymmetric", True, False, "gptq_v2"),
    ):
        N, K, group = 32, 128, 32
        linear = torch.nn.Linear(K, N, bias=False, dtype=torch.float16)
        g_idx = torch.arange(K, dtype=torch.int32) // group
        g_idx = g_idx[torch.randperm(K)] if act_order else g_idx
        scales = (torch.rand(N, K // group) / 8 + 0.01).half().float()
        zeros = torch.full((N, K // group), 8) if symmetric else torch.randint(0, 16, (N, K // group))
        codes = torch.randint(0, 16, (N, K))
        spread = (scales[:, g_idx.long()], zeros[:, g_idx.long()])
        linear.weight.data = (codes - spread[1]) * spread[0]
        made = TorchLinear(
            bits=4, group_size=group, sym=symmetric, desc_act=act_order, in_features=K, out_features=N, bias=False,
            pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        made.pack_block(linear, scales, zeros.float(), g_idx)
        made.optimized = True  # no torch.compile
        made.post_init()
        expected = made.dequantize_weight().t()
        settings = QuantizeConfig(bits=4, group_size=group, desc_act=act_order, sym=symmetric, format=form)
        if form == "gptq":
            convert_gptq_v2_to_v1_format_module(made, settings)
        names = ("qweight", "qzeros", "scales", "g_idx")
        settings.meta_set_versionable("quantizer", [f"gptqmodel:{version('gptqmodel')}"])  # as its writer does
        config = settings.to_dict()
        config["meta"].pop("offload_to_disk_path", None)  # a folder of the machine that made it
        save("gptqmodel", f"gptqmodel-{case}", {n: getattr(made, n) for n in names}, config, expected)


OWNERS: dict[str, tuple[str, Callable[[], None]]] = {
    "compressed-tensors": ("compressed-tensors", compressed_tensors),
    "compressed-tensors-actorder": ("compressed-tensors", compressed_tensors_actorder),
    "modelopt": ("nvidia-modelopt", modelopt),
    "autoawq": ("autoawq", autoawq),
    "gptqmodel": ("gptqmodel", gptqmodel),
}

if __name__ == "__main__":
    asked = sys.argv[1:]
    if not asked or not set(asked) <= set(OWNERS):
        sys.exit(f"usage: make.py OWNER...; owners: {', '.join(OWNERS)}")
    for name in asked:
        package, make = OWNERS[name]
        try:
            version(package)
        except PackageNotFoundError:
            sys.exit(f"{package} is not installed here")
        torch.manual_seed(0)
        make()
