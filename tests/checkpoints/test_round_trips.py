"""From format to format through files: every bit comes back, or the refusal names the weight."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from m4ov import checkpoint_command
from m4ov.checkpoints import Options, convert, open_checkpoint, verify
from m4ov.checkpoints.conversion import TARGETS
from m4ov.models.sharded import WeightsError
from m4ov_kernels.gemm import weights as formats
from m4ov_kernels.gemm.weights import FORMATS, Fp8Weight, Int4Weight, Int8Weight
from m4ov_kernels.gemm.weights.bits import same
from tests.checkpoints import small
from tests.kernels.quantized import scales, weights
from tests.kernels.test_gemm_formats_owners import FILES, PREFIX, format_of, load

INT4 = ("awq", "gptq", "gptq_v2", "compressed-tensors-int4", "modelopt-w4a16-awq")
BLOCK = ("compressed-tensors-fp8", "modelopt-fp8-pb-wo", "block-fp8")
TENSOR = ("compressed-tensors-fp8", "modelopt-fp8")
ORDERED = {"gptq", "gptq_v2", "compressed-tensors-int4"}
EACH = 20  # weights of a checkpoint


def int4(pair: set[str], generator: torch.Generator) -> list[Int4Weight]:
    """Weights that both formats hold, of one group size and symmetry, as a configuration has them."""
    modelopt = "modelopt-w4a16-awq" in pair
    size = random.choice((32, 64, 128) if modelopt else (32, 64, 128, -1))
    dtype = random.choice((torch.float16, torch.bfloat16))
    symmetric, order = modelopt or random.random() < 0.4, pair <= ORDERED and size != -1 and random.random() < 0.5
    made = []
    for _ in range(EACH):
        N, K = 8 * random.randint(1, 4), (32 if size == -1 else size) * random.randint(2, 3)
        G = 1 if size == -1 else K // size
        zeros = torch.randint(1, 16, (N, G), generator=generator).byte()
        zeros[0, 0] = 3  # not 8 throughout
        g_idx = (torch.arange(K) // (K if size == -1 else size))[torch.randperm(K, generator=generator)].int()
        codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
        values = scales((N, G), dtype, generator)
        rest = {"zeros": None if symmetric else zeros, "g_idx": g_idx if order else None}
        made.append(Int4Weight.from_codes(codes, values, group_size=size, **rest))
    return made


def fp8(granularity: str, generator: torch.Generator, dtype: torch.dtype) -> list[Fp8Weight]:
    made = []
    for _ in range(EACH):
        N, K = random.randint(1, 200), random.randint(1, 200)
        codes = torch.randint(0, 256, (N, K), generator=generator).byte()
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        shape = {"tensor": (1, 1), "block": (-(-N // 128), -(-K // 128))}[granularity]
        static = torch.rand(1, generator=generator) + 1e-3 if granularity == "tensor" else None
        values = codes.view(torch.float8_e4m3fn)
        made.append(Fp8Weight(values, scales(shape, dtype, generator), granularity, static))
    return made


def test_a_thousand_random_round_trips_are_bit_exact(tmp_path):
    """50 checkpoints of twenty weights, from a format to another and back: every tensor of the first, and its whole
    configuration, are there again."""
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    seen = set()
    for trip in range(50):
        first, second = random.sample(random.choice((INT4, INT4, BLOCK, TENSOR)), 2)
        pair = {first, second}
        if pair <= set(INT4):
            made = int4(pair, generator)
        else:
            wide = any(name.startswith("modelopt") for name in pair)
            made = fp8(
                "block" if pair <= set(BLOCK) else "tensor", generator, torch.float32 if wide else torch.bfloat16
            )
        names = {f"{small.TEXT}.{place}.mlp.down_proj": weight for place, weight in enumerate(made)}
        norm = {"model.language_model.norm.weight": torch.randn(3).bfloat16(), "lm_head.weight": torch.randn(5, 3)}
        bias = {f"{small.TEXT}.0.mlp.down_proj.bias": torch.randn(made[0].shape[0]).half()}
        shards = random.choice((1, 3))
        source = small.write(tmp_path / f"{trip}", names, first, norm | bias, shards=shards)
        once, back = tmp_path / f"{trip}-once", tmp_path / f"{trip}-back"
        there = convert(open_checkpoint(source), Options(once, second, shard_bytes=random.choice((1000, 2**30))))
        # ModelOpt's scales are float32: of which 16 bits they came, it cannot say.
        narrow = made[0].scales.dtype if isinstance(made[0], Int4Weight) and first != "modelopt-w4a16-awq" else None
        again = convert(open_checkpoint(once), Options(back, first, scale_dtype=narrow))
        assert len(there.exact) == len(again.exact) == EACH
        assert not there.rounded
        assert not again.rounded
        found, expected = small.load(back), small.load(source)
        assert found.keys() == expected.keys()
        wrong = [key for key in expected if not same(found[key], expected[key])]
        assert not wrong, (first, second, wrong)
        if not first.startswith("modelopt"):  # whose configuration stands twice in what is written here
            assert small.config_of(back) == small.config_of(source)
        assert (back / "tokenizer.json").is_file()
        seen.add((first, second))
    assert len(seen) > 10


@given(weights, st.sampled_from(TARGETS), st.sampled_from(("bfloat16", "float32")))
@settings(max_examples=80, deadline=None)
def test_a_conversion_keeps_every_value_or_names_the_weight(weight, target, dtype):
    source_format = next((name for name in FORMATS if _holds(weight, name)), None)
    assume(source_format is not None)
    name = f"{small.TEXT}.0.mlp.down_proj"
    with tempfile.TemporaryDirectory() as folder:
        source = small.write(Path(folder) / "source", {name: weight}, source_format)
        out = Path(folder) / "out"
        options = Options(out, target, dtype=getattr(torch, dtype))
        error = ""
        try:
            result = convert(open_checkpoint(source), options)
        except WeightsError as refused:
            error = str(refused)
        if error:
            assert (target == "plain" and "past the end" in error) or not _holds(weight, target), error
            assert name in error
            assert [path.name for path in Path(folder).iterdir()] == ["source"]
            return
        assert target == "plain" or _holds(weight, target)
        comparison = verify(open_checkpoint(source), open_checkpoint(out))
        assert comparison.ok, comparison.rows
        kinds = {row.verdict for row in comparison.rows}
        assert kinds <= ({"same", "equal"} if name in result.exact else {"rounded", "equal"})
        if target == "plain":
            exact = small.load(source)
            exact = formats.read(exact, open_checkpoint(source).quantization, name).dequantize(torch.float64)
            scale = getattr(weight, "pre_quant_scale", None)
            exact = exact if scale is None else exact * scale.double()
            assert torch.equal(small.load(out)[f"{name}.weight"], exact.to(options.dtype))


def _holds(weight, name: str) -> bool:
    if name == "plain":
        return True
    try:
        formats.write(weight, name, "x")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_owners_file_is_a_checkpoint(path, tmp_path):
    """The files that the formats' own libraries wrote, dequantised, are what those libraries made of them."""
    tensors, config, _ = load(path)
    expected = tensors.pop("expected")
    (tmp_path / "model").mkdir()
    small.store(tmp_path / "model", tensors)
    (tmp_path / "model/config.json").write_text("{}")
    small.edit(tmp_path / "model", lambda content: content.update(quantization_config=config))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.format_of(PREFIX) == format_of(path)
    convert(checkpoint, Options(tmp_path / "plain", "plain", dtype=torch.float32))
    found = load_file(tmp_path / "plain/model.safetensors")[f"{PREFIX}.weight"]
    if format_of(path) == "modelopt-w4a16-awq":
        expected = expected * tensors.get(f"{PREFIX}.pre_quant_scale", torch.ones(())).float()
        error = (found - expected).abs()
        assert bool((error <= 4 * torch.finfo(torch.float32).eps * expected.abs()).all())
    else:
        assert torch.equal(found.to(expected.dtype), expected)
    assert verify(checkpoint, open_checkpoint(tmp_path / "plain")).ok


def test_what_a_format_cannot_hold_is_named_before_anything_is_written(tmp_path):
    torch.manual_seed(0)
    good, odd = (Int4Weight.quantize(small.linear(N, 64).half(), group_size=32) for N in (16, 12))
    names = [f"{small.TEXT}.0.mlp.{own}" for own in ("gate_proj", "up_proj", "down_proj")]
    made = dict(zip(names, (good, odd, good), strict=True))
    source = small.write(tmp_path / "source", made, "compressed-tensors-int4")
    with pytest.raises(WeightsError, match=r"1 of 3 weights cannot be written as awq: \S+up_proj: .*12 isn't a mul"):
        convert(open_checkpoint(source), Options(tmp_path / "out", "awq"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    # Dequantised, and with it the one that a server would join with it.
    result = convert(open_checkpoint(source), Options(tmp_path / "out", "awq", unfit="plain"))
    assert result.plain.keys() == set(names[:2])
    assert "a server joins them" in result.plain[names[0]]
    assert result.exact == [names[2]]
    found = small.load(tmp_path / "out")
    assert torch.equal(found[f"{names[1]}.weight"], odd.dequantize(torch.float64).bfloat16())
    config = small.config_of(tmp_path / "out")["quantization_config"]
    assert set(config["modules_to_not_convert"]) == {*names[:2], "lm_head"}
    assert formats.read(found, config, names[2]).without_zeros().equal(good)


def test_modules_of_several_schemes(tmp_path):
    """compressed-tensors has a group for each; a format with one configuration for all says which two differ."""
    names = [f"{small.TEXT}.{place}.mlp.down_proj" for place in range(3)]
    made = [Int4Weight.quantize(small.linear(16, 128).half(), group_size=size) for size in (64, 64, 128)]
    source = small.write(tmp_path / "source", dict(zip(names[:2], made[:2], strict=True)), "gptq_v2")
    tensors, _ = formats.write(made[2], "gptq_v2", names[2])
    small.store(source, small.load(source) | tensors)
    own = {"dynamic": {"+:.*layers.2.*": {"group_size": 128}}}
    small.edit(source, lambda config: config["quantization_config"].update(own))
    convert(open_checkpoint(source), Options(tmp_path / "out", "compressed-tensors-int4"))
    written = open_checkpoint(tmp_path / "out")
    assert all(written.read(name).equal(weight) for name, weight in zip(names, made, strict=True))
    assert written.quantization["config_groups"]["group_1"]["targets"] == [names[2]]
    with pytest.raises(WeightsError, match=r"awq has one configuration for all weights, and .*layers\.0.*layers\.2"):
        convert(written, Options(tmp_path / "awq", "awq"))


def test_act_order_of_some_modules(tmp_path):
    """compressed-tensors has a group for those with it; GPTQ has it said once, and then for all."""
    names = [f"{small.TEXT}.{place}.mlp.down_proj" for place in range(3)]
    order = (torch.arange(64) // 32)[torch.randperm(64)].int()
    made = [
        Int4Weight.quantize(small.linear(16, 64).half(), group_size=32, g_idx=g_idx) for g_idx in (None, order, order)
    ]
    source = small.write(tmp_path / "source", dict(zip(names[1:], made[1:], strict=True)), "gptq")
    small.store(source, small.load(source) | formats.write(made[0], "gptq", names[0])[0])
    for place, (target, back) in enumerate((("compressed-tensors-int4", "gptq_v2"), ("gptq_v2", "gptq"))):
        convert(open_checkpoint(source), Options(tmp_path / f"{place}-out", target))
        convert(open_checkpoint(tmp_path / f"{place}-out"), Options(tmp_path / f"{place}-back", back))
        for folder in ("out", "back"):
            written = open_checkpoint(tmp_path / f"{place}-{folder}")
            assert all(written.read(name).equal(weight) for name, weight in zip(names, made, strict=True))
        assert small.config_of(tmp_path / f"{place}-back")["quantization_config"]["desc_act"] is True


def test_scales_are_rounded_only_when_asked(tmp_path):
    weight = Int4Weight.quantize(small.linear(16, 64), group_size=32)
    assert weight.scales.dtype is torch.float32
    name = f"{small.TEXT}.0.mlp.down_proj"
    source = open_checkpoint(small.write(tmp_path / "source", {name: weight}, "modelopt-w4a16-awq"))
    with pytest.raises(WeightsError, match="float32 scales are exact neither"):
        convert(source, Options(tmp_path / "out", "awq"))
    result = convert(source, Options(tmp_path / "out", "awq", scale_dtype=torch.float16))
    assert result.exact == []
    assert 0 < result.rounded[name] <= 2**-11
    found = open_checkpoint(tmp_path / "out").read(name)
    assert torch.equal(found.codes(), weight.codes())
    assert torch.equal(found.scales, weight.scales.half())
    row = next(row for row in verify(source, open_checkpoint(tmp_path / "out")).rows if row.name == name)
    assert row.verdict == "rounded"
    assert 0 < row.error < 2**-11
    weight.scales[3] = 1e-9
    source = open_checkpoint(small.write(tmp_path / "least", {name: weight}, "modelopt-w4a16-awq"))
    with pytest.raises(WeightsError, match="scales that float16 would round to 0"):
        convert(source, Options(tmp_path / "none", "awq", scale_dtype=torch.float16))


def test_one_scale_written_out_keeps_every_value(tmp_path):
    """What a server would round to one scale for q, k and v keeps all of them by channel."""
    names = [f"{small.TEXT}.0.self_attn.{own}_proj" for own in "qkv"]
    made = {
        name: Fp8Weight.quantize(small.linear(32, 48) * 3**place, granularity="tensor")
        for place, name in enumerate(names)
    }
    made = {name: Fp8Weight(w.values, w.scales, "tensor", torch.ones(1)) for name, w in made.items()}
    source = open_checkpoint(small.write(tmp_path / "source", made, "modelopt-fp8"))
    options = Options(tmp_path / "out", "compressed-tensors-fp8", granularity="channel")
    assert sorted(convert(source, options).exact) == sorted(names)
    written = open_checkpoint(tmp_path / "out")
    for name, weight in made.items():
        assert written.read(name).granularity == "channel"
        assert torch.equal(written.read(name).dequantize(torch.float64), weight.dequantize(torch.float64))
    assert {row.verdict for row in verify(source, written).rows} == {"equal"}


def test_int8_goes_to_plain_alone(tmp_path):
    name = f"{small.TEXT}.0.mlp.down_proj"
    weight = Int8Weight.quantize(small.linear(5, 7).bfloat16())
    source = open_checkpoint(small.write(tmp_path / "source", {name: weight}, "compressed-tensors-int8"))
    for target in set(FORMATS) - {"compressed-tensors-int8"}:
        with pytest.raises(WeightsError, match=f"cannot be written as {target}"):
            convert(source, Options(tmp_path / "out", target))
    result = convert(source, Options(tmp_path / "out", "plain", dtype=torch.float32))
    assert result.exact == [name]
    assert "quantization_config" not in small.config_of(tmp_path / "out")
    assert small.config_of(tmp_path / "out")["dtype"] == "float32"


def test_the_command_knows_the_formats():
    assert set(checkpoint_command.FORMATS) == set(TARGETS)
