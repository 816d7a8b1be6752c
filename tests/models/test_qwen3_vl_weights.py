"""Weights in and out: folders of transformers' and ours, each read by the other; broken ones; memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from m4ov.models.qwen3_vl import Config, Qwen3VL, WeightsError, export, from_pretrained, load, new, save, shapes
from tests.kernels import tiny_models as tiny
from tests.models.pairs import FAMILIES, batch_of, ours_of

transformers.logging.disable_progress_bar()
# Shapes of the experts: neither matrix square, the first, the second.
WIDTHS = {"qwen3_vl": [{}], "qwen3_vl_moe": [{"moe_intermediate_size": width} for width in (48, 32, 64)]}
CASES = [(family, options, tie) for family in FAMILIES for options in WIDTHS[family] for tie in (False, True)]


def same(ours: Qwen3VL, theirs) -> None:
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shard", [None, "100KB"])
@pytest.mark.parametrize(("family", "options", "tie"), CASES)
def test_a_folder_of_transformers_is_read(family, options, tie, shard, tmp_path):
    theirs = tiny.model(family, tie=tie, **options)
    theirs.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard is not None)
    ours = from_pretrained(tmp_path)
    same(ours, theirs)
    assert (ours.lm_head.weight is ours.model.language_model.embed_tokens.weight) == tie
    assert ours.config == ours_of(theirs).config
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    same(half, theirs)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("shard_bytes", [2**30, 100_000])
@pytest.mark.parametrize(("family", "options", "tie"), CASES)
def test_a_folder_of_ours_is_read_by_transformers_and_by_us(family, options, tie, shard_bytes, tmp_path):
    theirs = tiny.model(family, tie=tie, **options)
    ours = ours_of(theirs)
    save(ours, tmp_path / "out", shard_bytes=shard_bytes)
    assert ("model.safetensors.index.json" in files(tmp_path / "out")) == (shard_bytes < 2**30)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) <= shard_bytes + 40_000  # or one tensor, of up to 131 kB, and headers
    loaded, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.dtype == torch.float32
    same(ours, loaded)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tie
    same(from_pretrained(tmp_path / "out"), theirs)
    assert files(tmp_path) == ["out"]


def test_the_layout_of_published_experts_is_read_and_written(tmp_path):
    """[E, H, 2·I] and [E, I, H], which transformers, too, turns round."""
    theirs = tiny.model("qwen3_vl_moe")
    ours = ours_of(theirs)
    save(ours, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in ours.named_parameters():
        turned = parameter.transpose(1, 2) if ".experts." in name else parameter
        assert torch.equal(stored[name], turned), name
    # Published like this even where a matrix is square: the other tells.
    square = ours_of(tiny.model("qwen3_vl_moe", moe_intermediate_size=32))
    save(square, tmp_path / "square")
    path = tmp_path / "square" / "model.safetensors"
    stored = {n: v.transpose(1, 2).contiguous() if ".experts." in n else v for n, v in load_file(path).items()}
    save_file(stored, path)
    read = dict(from_pretrained(tmp_path / "square").named_parameters())
    assert all(torch.equal(parameter, read[name]) for name, parameter in square.named_parameters())


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    ours = ours_of(tiny.model(tie=True))
    save(ours, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    head = stored["model.language_model.embed_tokens.weight"].clone()
    save_file({**stored, "lm_head.weight": head}, path)
    read = dict(from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(parameter, read[name]) for name, parameter in ours.named_parameters())
    head[-1, -1] += 1
    save_file({**stored, "lm_head.weight": head}, path)
    with pytest.raises(WeightsError, match=r"lm_head.weight is not .*embed_tokens.weight, and tie_word_embeddings"):
        from_pretrained(tmp_path / "out")


def _shard_missing(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _shard_cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


def _edited(edit):
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        stored = load_file(path)
        edit(stored, sorted(stored)[0])
        save_file(stored, path)

    return apply


def _index(edit):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def _everywhere(edit):
    """In the file and in the index."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        stored = {}
        for path in folder.glob("*.safetensors"):
            stored |= load_file(path)
            path.unlink()
        edit(stored)
        save_file(stored, folder / "model.safetensors")

    return apply


def _configured(**values):
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, value in values.items():
            section, _, key = name.rpartition("__")
            (config[section] if section else config)[key] = value
        path.write_text(json.dumps(config))

    return apply


NORM = "model.language_model.norm.weight"
FAULTS = {
    "a shard is missing": (_shard_missing, r"model-00002-of-\d+\.safetensors of \d+ shards missing"),
    "a shard is cut off": (_shard_cut, r"model-00002-of-\d+\.safetensors: cannot be read"),
    "a shard lacks a tensor": (_edited(lambda s, n: s.pop(n)), r"00001-of-\d+\.safetensors: \S+ missing; .*index"),
    "a shard has one more": (_edited(lambda s, n: s.update(more=torch.ones(2))), r"more there; .*index\S* does not"),
    "the index names none": (_index(lambda m: m.update(more="../other.safetensors")), "names of files in this folder"),
    "an index of nothing": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "not an index"),
    "no weights at all": (lambda f: [p.unlink() for p in f.glob("*.saf*")], r"expected model.safetensors or .*index"),
    "a tensor is missing": (_everywhere(lambda s: s.pop(NORM)), rf"{NORM} missing: 1 of \d+ tensors"),
    "a tensor too many": (_everywhere(lambda s: s.update(more=torch.ones(2))), "more there, and the model has none"),
    "a misshapen tensor": (
        _everywhere(lambda s: s.update({NORM: torch.ones(63)})),
        rf"{NORM}: expected \[64\], got \[63\]",
    ),
    "integers": (
        _everywhere(lambda s: s.update({NORM: torch.ones(64, dtype=torch.int8)})),
        rf"{NORM}: expected one of F64, .*got I8",
    ),
    "another model": (_configured(model_type="llava"), "model_type: expected qwen3_vl or qwen3_vl_moe, got 'llava'"),
    "another depth": (_configured(text_config__num_hidden_layers=4), r"another model: text_config.num_hidden_layers"),
    "another theta": (
        _configured(text_config__rope_parameters={"rope_theta": 7.0, "mrope_section": [4, 2, 2]}),
        r"another model: .*rope_theta \(7.0 there, 10000.0 here\)",
    ),
    "a rotation that is not built": (
        _configured(text_config__rope_parameters={"rope_type": "yarn", "rope_theta": 7.0}),
        "text_config.rope_parameters.rope_type: expected 'default', got 'yarn'",
    ),
    "quantised": (_configured(quantization_config={"quant_method": "fp8"}), "quantization_config: expected none"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"config.json: cannot be read"),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), r"config.json: not a configuration"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_refused_and_nothing_is_loaded(fault, tmp_path):
    breaks, message = FAULTS[fault]
    ours = ours_of(tiny.model(head_dim=16))
    save(ours, tmp_path / "out", shard_bytes=100_000)
    load(ours, tmp_path / "out")  # as it is, it is fine
    breaks(tmp_path / "out")
    before = new(ours.config, seed=1)
    model = new(ours.config, seed=1)
    with pytest.raises(WeightsError, match=message):
        load(model, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_a_model_without_memory_is_refused(tmp_path):
    ours = ours_of(tiny.model())
    save(ours, tmp_path / "out")
    with torch.device("meta"):
        empty = Qwen3VL(ours.config)
    with pytest.raises(ValueError, match=r"load: model.visual.* meta device; model.to_empty"):
        load(empty, tmp_path / "out")


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    ours = ours_of(tiny.model())
    (tmp_path / "out").mkdir()
    save(ours, tmp_path / "out")  # empty: allowed
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(WeightsError, match="out: exists already"):
        save(new(ours.config, seed=1), tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_save_that_fails_leaves_nothing(tmp_path):
    ours = ours_of(tiny.model())
    tensors = list(ours.named_parameters())
    wrong = {
        "expected lm_head.weight, got no more tensors": tensors[:-1],
        r"expected model\.\S+, got lm_head": [tensors[-1], *tensors[:-1]],
        r"model.visual.patch_embed\S+: expected \[32, 3, 2, 4, 4\], got \[3\]": [(tensors[0][0], torch.ones(3))],
    }
    expected = [name for name, _ in tensors]
    assert expected == list(shapes(ours.config))
    for message, given in wrong.items():
        with pytest.raises(WeightsError, match=message):
            export(ours.config, given, tmp_path / "out", dtype=torch.float32)
        assert files(tmp_path) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match="file/out: cannot be written"):
        save(ours, tmp_path / "file" / "out")


LIMITED = """
import resource, sys
from pathlib import Path
from m4ov.models.qwen3_vl import WeightsError, Config, new, save
folder = Path(sys.argv[1])
model = new(Config.from_dict({config}))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save(model, folder / "out")
except WeightsError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    config = ours_of(tiny.model()).config.to_dict()
    child = subprocess.run(
        [sys.executable, "-c", LIMITED.replace("{config}", repr(config)), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "out: cannot be written (File too large)" in child.stdout
    assert files(tmp_path) == []


MEMORY = """
import sys
from pathlib import Path
import torch
from m4ov.models.qwen3_vl import Config, TextConfig, VisionConfig, from_pretrained, load, new, save

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def extra(function):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = function()
    return status("VmHWM") - before, made

torch.set_num_threads(1)
folder, which = Path(sys.argv[1]), sys.argv[2]
text = TextConfig(vocab_size=3000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
                  num_key_value_heads=8, num_experts=8 if which == "moe" else 0, num_experts_per_tok=2,
                  moe_intermediate_size=192)
vision = VisionConfig(depth=1, hidden_size=64, intermediate_size=64, num_heads=1, num_position_embeddings=16,
                      out_hidden_size=512, deepstack_visual_indexes=())
model = new(Config(text, vision), dtype=torch.bfloat16)
sizes = [parameter.nbytes / 2**20 for parameter in model.parameters()]
save(model, folder / "warm")
print(sum(sizes), max(sizes))
print(extra(lambda: save(model, folder / "out", shard_bytes=40_000_000))[0])
print(extra(lambda: save(model, folder / "wide", dtype=torch.float32))[0])
print(extra(lambda: load(model, folder / "wide"))[0])
del model
print(extra(lambda: from_pretrained(folder / "out"))[0])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell")
@pytest.mark.parametrize("which", ["dense", "moe"])
def test_weights_go_in_and_out_one_tensor_at_a_time(which, tmp_path):
    """Beside the model itself, the peak is that of about one tensor, whatever it is converted to."""
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), which], capture_output=True, text=True, check=True
    )
    (total, largest), *extras = (list(map(float, line.split())) for line in child.stdout.splitlines())
    slack = 10  # MiB: allocators, headers, code that runs for the first time
    assert largest < 5
    assert total > 80
    saved, widened, loaded, made = (extra for (extra,) in extras)
    assert saved <= largest + slack
    assert widened <= 2 * largest + slack  # one tensor in float32
    assert loaded <= 2 * largest + slack
    assert made <= total + largest + slack


@pytest.mark.parametrize("name", ["2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b"])
def test_published_sizes_are_transformers(name):
    """Names and shapes; and what is known of the published checkpoints."""
    config = Config.preset(name)
    found = shapes(config)
    kind = "Qwen3VLMoe" if config.text.num_experts else "Qwen3VL"
    theirs = getattr(transformers, f"{kind}Config")(**config.to_dict())
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(theirs)
    assert found == {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    count = sum(torch.Size(shape).numel() for shape in found.values())
    published = {
        "2b": 2_127_532_032,
        "4b": 4_437_815_808,
        "8b": 8_767_123_696,
        "32b": 33_357_282_544,
        "30b-a3b": 31_070_754_032,
        "235b-a22b": 235_704_000_000,
    }
    assert count == pytest.approx(published[name], rel=1e-3), count
    assert Config.from_dict(theirs.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match=r"preset: expected one of 2b, 4b, .*, got '7b'"):
        Config.preset("7b")


def test_the_readme_does_what_it_says(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "m4ov.models" in part)
    theirs = tiny.model()
    theirs.save_pretrained(tmp_path / "theirs")
    batch = batch_of(theirs, tiny.mixed_samples(theirs))
    names = {"folder": tmp_path / "theirs", "new_folder": tmp_path / "ours", "batch": batch}
    exec(compile(code, "README.md", "exec"), names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    same(names["model"], type(theirs).from_pretrained(tmp_path / "ours"))
    assert {parameter.device.type for parameter in names["large"].parameters()} == {"meta"}


def test_our_model_needs_no_transformers():
    code = "import sys; import m4ov.models.qwen3_vl as q; q.Qwen3VL; print('transformers' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "False"
