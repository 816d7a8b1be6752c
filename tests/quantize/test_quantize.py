"""`m4ov quantize` from a checkpoint to a checkpoint: bits, names, ignore lists, heads, accuracy."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from m4ov import cli, quantize
from m4ov.checkpoints import inspect, open_checkpoint, verify
from m4ov.evaluate import exact_match
from m4ov.models.qwen3_vl import build, cast_parameters
from m4ov.quantize import checkpoint
from m4ov.quantize.data import Calibration
from m4ov.quantize.linears import linears_of
from m4ov_kernels.gemm.weights import Fp8Weight, Int4Weight, Int8Weight, read
from m4ov_kernels.gemm.weights.bits import same
from tests.evaluate import published
from tests.kernels import tiny_models
from tests.quantize import tiny
from tests.tiny_task import tiny_task

SCHEMES = ("w4", "w8a8", "fp8-row", "fp8-block")
PACK = {
    "w4": lambda w, size: Int4Weight.quantize(w, group_size=size, scale_dtype=torch.bfloat16),
    "w8a8": lambda w, size: Int8Weight.quantize(w),
    "fp8-row": lambda w, size: Fp8Weight.quantize(w),
    "fp8-block": lambda w, size: Fp8Weight.quantize(w, granularity="block"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def source(folder):
    return tiny.trained(folder)


@pytest.fixture(scope="module")
def data(folder):
    return tiny.questions(folder)


@pytest.fixture(scope="module")
def made(folder, source, data):
    """name → the folder that the command writes."""
    done = {}

    def make(name: str, *arguments: str):
        if name not in done:
            out = folder / name
            command = ["--traceback", "quantize", str(source), "--out", str(out), "--no-evaluate", "--threads", "1"]
            command += ["--calibrate", str(data), "--batches", "1", *arguments]
            assert cli.main(command) == 0
            done[name] = out
        return done[name]

    return make


def everything(made, scheme: str):
    return made(scheme, "--scheme", scheme, "--vision", "--merger", "--keep", "2")


def files(path):
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(path):
    return json.loads((path / "config.json").read_text())


def unquantised():
    return build(tiny_task().model_config, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_of_the_source_rounded_to_nearest(made, scheme, capsys):
    out = everything(made, scheme)
    tensors, config = files(out), config_of(out)["quantization_config"]
    report = {layer["name"]: layer for layer in json.loads((out / "quantization.json").read_text())["layers"]}
    wide = tiny.weights()
    quantised = 0
    for name, linear in linears_of(unquantised()).items():
        layer = report[name]
        assert layer["shape"] == list(linear.weight.shape)
        if layer["kept"] is not None:
            if name != "lm_head":  # tied: the embeddings are it
                assert torch.equal(tensors[f"{name}.weight"], wide[f"{name}.weight"].bfloat16())
            continue
        quantised += 1
        expected = PACK[scheme](wide[f"{name}.weight"], layer["group_size"])
        assert read(tensors, config, name).equal(expected)
        assert layer["bits"] == 8 * expected.nbytes / linear.weight.numel()
        off = (expected.dequantize(torch.float32) - wide[f"{name}.weight"]).norm() / wide[f"{name}.weight"].norm()
        assert layer["weight_error"] == pytest.approx(float(off), rel=1e-4)
        assert 0 < layer["error"] < 0.5
    assert quantised >= len(report) - 5  # the head, and two groups at most
    rest = {name: value for name, value in wide.items() if name.removesuffix(".weight") not in report}
    assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in rest.items())
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (out / name).is_file()
    assert not list(out.parent.glob(".*writing*"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_ignore_list_is_the_truth(made, scheme):
    for out in (everything(made, scheme), made(f"{scheme}-text", "--scheme", scheme, "--keep", "0")):
        tensors, config = files(out), config_of(out)["quantization_config"]
        for name in linears_of(unquantised()):
            weight = tensors.get(f"{name}.weight")
            plain = name == "lm_head" or (weight is not None and weight.dtype is torch.bfloat16)
            assert checkpoint.ignored(config, name) == plain, name
    if scheme != "fp8-block":
        assert "re:.*visual\\..*" in config["ignore"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_checkpoint_doctor_finds_it_sound(made, source, scheme):
    for out in (everything(made, scheme), made(f"{scheme}-text", "--scheme", scheme, "--keep", "0")):
        checkpoint = open_checkpoint(out)
        report = inspect(checkpoint)
        # Widths of a model as small as this are no multiples of 128, so that a server cannot join its blocks.
        errors = [finding.message for finding in report.findings if finding.level == "error"]
        assert all(scheme == "fp8-block" and "blocks of 128 would reach over the seam" in error for error in errors)
        assert bool(errors) == (scheme == "fp8-block")
        assert sum(part["quantised"] for part in report.linears.values()) == len(checkpoint.modules) > 5
        assert set(checkpoint.modules) | set(checkpoint.linears) | {"lm_head"} == set(linears_of(unquantised()))
        compared = verify(open_checkpoint(source), checkpoint, tolerance=0.3)
        assert compared.ok, [row for row in compared.rows if row.verdict == "different"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loaded_model_computes_with_the_files_weights_and_answers_as_before(made, source, scheme):
    out = everything(made, scheme)
    loaded = quantize.load(out)
    split, encoder = tiny.held_out(), tiny_task().encoder
    before = cast_parameters(quantize.load_source(source, torch.float32), torch.bfloat16)
    answers = [
        exact_match(model, split, encoder, tokens_per_batch=2000, dtype=torch.bfloat16) for model in (before, loaded)
    ]
    lost = answers[0].value - answers[1].value
    assert answers[0].value > 0.4
    assert lost <= (0.05 if scheme == "w4" else 0.02), lost
    assert loaded.dtype is torch.bfloat16
    tensors, config = files(out), config_of(out)["quantization_config"]
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert kinds & {"Int4Linear", "Int8Linear", "Fp8Linear"}
    for name in linears_of(unquantised()):
        module = loaded.get_submodule(name)
        if not checkpoint.ignored(config, name):
            assert module.quantized_weight.equal(read(tensors, config, name))
            assert (module.bias is None) == (f"{name}.bias" not in tensors)
            assert module.bias is None or torch.equal(module.bias, tensors[f"{name}.bias"])


def test_a_tied_head_stays_or_is_untied(made):
    kept = everything(made, "w8a8")
    assert config_of(kept)["tie_word_embeddings"]
    assert "lm_head.weight" not in files(kept)
    loaded = quantize.load(kept)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    out = made("head", "--scheme", "w8a8", "--lm-head", "--keep", "0")
    config, tensors = config_of(out), files(out)
    assert not config["tie_word_embeddings"]
    assert not config["text_config"]["tie_word_embeddings"]
    embeddings = tiny.weights()["model.language_model.embed_tokens.weight"]
    assert torch.equal(tensors["model.language_model.embed_tokens.weight"], embeddings.bfloat16())
    assert read(tensors, config["quantization_config"], "lm_head").equal(Int8Weight.quantize(embeddings))
    report = json.loads((out / "quantization.json").read_text())
    assert any("untied" in note for note in report["notes"])
    assert type(quantize.load(out).lm_head).__name__ == "Int8Linear"


def test_awq_folds_what_it_scales(made, source):
    out = made("awq", "--scheme", "w4", "--vision", "--merger", "--method", "awq", "--keep", "0")
    report = json.loads((out / "quantization.json").read_text())
    scaled = {layer["name"] for layer in report["layers"] if layer["scaled"]}
    assert any(".visual." in name for name in scaled)
    assert any(".q_proj" in name for name in scaled)
    norm = "model.language_model.layers.0.input_layernorm.weight"
    assert not torch.equal(files(out)[norm], tiny.weights()[norm].bfloat16())
    plain = json.loads(
        (made("rtn", "--scheme", "w4", "--vision", "--merger", "--keep", "0") / "quantization.json").read_text()
    )
    error = [sum(layer["error"] or 0 for layer in one["layers"]) for one in (report, plain)]
    assert error[0] < error[1]


def test_a_tower_that_is_silently_quantised_or_not_is_refused(made, folder):
    out = everything(made, "w8a8")
    for case, edit in (
        ("unquantised", lambda config: config["ignore"].remove(config["ignore"][0])),
        ("quantised", lambda config: config["ignore"].append("re:.*visual\\..*")),
    ):
        copied = folder / f"tampered-{case}"
        shutil.copytree(out, copied)
        config = config_of(copied)
        edit(config["quantization_config"])
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(quantize.QuantizedCheckpointError, match="ignore"):
            quantize.load(copied)
    copied = folder / "tampered-tensors"
    shutil.copytree(out, copied)
    tensors = files(out)
    lost = next(name for name in tensors if ".visual." in name and name.endswith(".weight_scale"))
    del tensors[lost]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(quantize.QuantizedCheckpointError, match=re.escape(lost.removesuffix(".weight_scale"))):
        quantize.load(copied)


def test_nothing_is_left_where_writing_fails(made, source, folder, monkeypatch):
    def refuse(*_):
        raise quantize.QuantizedCheckpointError("no")

    monkeypatch.setattr(checkpoint, "verify", refuse)
    before = sorted(folder.iterdir())
    arguments = ["quantize", str(source), "--scheme", "w8a8", "--calibrate", "none", "--no-evaluate"]
    assert cli.main([*arguments, "--out", str(folder / "fails")]) == 2
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_goes_through_files_and_comes_back(family, tmp_path):
    torch.manual_seed(1)
    model = tiny_models.model(family).eval()
    model.save_pretrained(tmp_path / "model")
    batch = tiny_models.packed(model, tiny_models.samples(model))
    (tmp_path / "batches").mkdir()
    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "batches/0.safetensors")
    arguments = ["--vision", "--merger", "--lm-head", "--method", "awq", "--calibrate", str(tmp_path / "batches")]
    command = ["--traceback", "quantize", str(tmp_path / "model"), "--scheme", "fp8-row", "--keep", "1", *arguments]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/quantization.json").read_text())
    assert sum(layer["kept"] is not None for layer in report["layers"]) in (1, 2, 3)
    # Random weights: a loss near the logarithm of the vocabulary, and small differences.
    assert report["after"]["loss"] == pytest.approx(report["before"]["loss"], rel=0.05)
    assert report["after"]["file_bytes"] < report["before"]["file_bytes"]


def test_widths_that_fit_no_group_are_kept_and_said(tmp_path, capsys):
    model = tiny_models.model(vision={"intermediate_size": 44})
    model.save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "--scheme", "w4", "--vision", "--calibrate", "none"]
    assert cli.main(["--traceback", *command, "--out", str(tmp_path / "out")]) == 0
    layers = json.loads((tmp_path / "out/quantization.json").read_text())["layers"]
    kept = {layer["name"]: layer["kept"] for layer in layers if layer["part"] == "vision" and layer["kept"]}
    assert kept.keys() == {f"model.visual.blocks.{block}.mlp.linear_fc2" for block in range(2)}
    assert set(kept.values()) == {"its 44 inputs are in no whole groups of 32"}
    quantize.load(tmp_path / "out")


def test_compressed_tensors_reads_what_is_written(made):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for scheme in ("w4", "w8a8", "fp8-row"):
        out = everything(made, scheme)
        tensors, written = files(out), config_of(out)["quantization_config"]
        config = QuantizationConfig.model_validate(written)
        for name, linear in linears_of(unquantised()).items():
            hits = [
                group for group in config.config_groups.values() if is_match(name, linear, group.targets, config.ignore)
            ]
            quantised = any(f"{name}.weight_{leaf}" in tensors for leaf in ("packed", "scale"))
            assert len(hits) == int(quantised), name
            if quantised:
                state = {key.rpartition(".")[2]: v for key, v in tensors.items() if key.startswith(f"{name}.weight")}
                compressor = BaseCompressor.get_value_from_registry(config.format)
                found = compressor.decompress(state, hits[0])["weight"]
                assert same(found.float(), read(tensors, written, name).dequantize(found.dtype).float())
            own = name.rpartition(".")[2]
            for engine, shards in fused.items():  # what engines fuse is quantised together or not at all
                if own == shards[0] and "visual" not in name:
                    joined = f"{name.rpartition('.')[0]}.{engine}"
                    matched = any(
                        is_match(joined, linear, group.targets, config.ignore, fused)
                        for group in config.config_groups.values()
                    )
                    assert matched == quantised


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_what_is_written(made, scheme):
    """With compressed-tensors, and its own block fp8: every tensor has its place, and every weight our values."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = everything(made, scheme)
    how = (
        transformers.FineGrainedFP8Config(dequantize=True)
        if scheme == "fp8-block"
        else transformers.CompressedTensorsConfig(run_compressed=False)
    )
    theirs, info = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.bfloat16, quantization_config=how, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors, config = files(out), config_of(out)["quantization_config"]
    for name, linear in linears_of(theirs).items():
        if not checkpoint.ignored(config, name):
            assert torch.equal(linear.weight, read(tensors, config, name).dequantize(torch.bfloat16)), name


def test_modelopt_finds_scales(made):
    pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")
    arguments = ["--scheme", "w4", "--vision", "--method", "awq", "--calibrator", "modelopt", "--keep", "0"]
    report = json.loads((made("modelopt", *arguments) / "quantization.json").read_text())
    quantised = [layer for layer in report["layers"] if layer["kept"] is None]
    assert {layer["name"].rpartition(".")[2] for layer in quantised if not layer["scaled"]} == {"linear_fc2"}
    assert report["after"]["loss"] < report["before"]["loss"] + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "w3"], "--scheme: expected one of w4, w8a8, fp8-block, fp8-row; got w3"),
        (["--scheme", "w4", "--method", "gptq"], "--method: expected one of rtn, awq"),
        (["--scheme", "w4", "--group-size", "100"], "--group-size: expected 128, 64, 32 or -1"),
        (["--scheme", "w4", "--calibrate", "nowhere"], "--calibrate: nowhere: no such file or folder"),
        (["--scheme", "w4", "--method", "awq", "--calibrate", "none"], "--calibrate: awq needs data"),
        (["--scheme", "w4", "--keep", "some"], "--keep: expected auto"),
        (["--scheme", "w4", "--keep", "3", "--calibrate", "none"], "--calibrate: --keep 3 needs data"),
        (["--scheme", "w8a8", "--calibrator", "modelopt"], "--calibrator modelopt: finds the scales of"),
        (["--scheme", "w4", "--batches", "0"], "--batches: expected at least 1"),
        (["--scheme", "w4", "--out", "{source}"], "--out: {source} exists already"),
        (["--scheme", "w4", "--calibrate", "{source}"], "--calibrate: {source}/model.safetensors: expected labels"),
    ],
)
def test_a_mistake_names_its_argument(source, arguments, message, capsys):
    filled = [argument.format(source=source) for argument in arguments]
    assert cli.main(["quantize", str(source), *filled]) == 2
    assert message.format(source=source) in " ".join(capsys.readouterr().err.split())


def test_a_model_that_is_none_is_refused(folder, made, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "MODEL: {}: no such folder"),
        (tmp_path / "empty", "MODEL: {}: expected a checkpoint; it has no config.json"),
        (everything(made, "w8a8"), "MODEL is quantised already"),
    ):
        assert cli.main(["quantize", str(path), "--scheme", "w4", "--out", str(tmp_path / "out")]) == 2
        assert message.format(path) in capsys.readouterr().err
    with pytest.raises(quantize.QuantizedCheckpointError, match="this model is not quantised"):
        quantize.load(folder / "model")


def test_evaluate_asks_a_quantised_checkpoint(made, source, tmp_path):
    numbers = []
    for path in (source, everything(made, "w8a8")):
        arguments = ["evaluate", str(path), "--limit", "60", "--threads", "1", "--json", str(tmp_path / "a.json")]
        assert cli.main(["--traceback", *arguments]) == 0
        numbers.append(json.loads((tmp_path / "a.json").read_text())["accuracy"])
    assert numbers[0].keys() == {"general", "domain"}
    assert abs(numbers[0]["general"] - numbers[1]["general"]) <= 0.05


def test_eval_asks_benchmarks_of_a_quantised_checkpoint(made, tmp_path, capsys):
    data = published.write_mmbench(tmp_path / "mmbench.tsv", 2)
    arguments = ["eval", str(everything(made, "w8a8")), "--bench", "mmbench", "--data", str(data), "--max-tokens", "4"]
    arguments += ["--threads", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["--traceback", *arguments]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/mmbench.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(row["tokens"] for row in rows)
    assert "quantised linears" in (tmp_path / "out/report.html").read_text()
    assert cli.main([*arguments[:-1], str(tmp_path / "other"), "--weights", "int8"]) == 2
    assert "is quantised already" in capsys.readouterr().err


def test_the_commands_schemes_are_the_packages():
    from m4ov import quantization
    from m4ov.quantize import flow

    assert set(quantization.SCHEMES) == set(quantize.SCHEMES)
    assert (quantization.METHODS, quantization.CALIBRATORS) == (flow.METHODS, flow.CALIBRATORS)


def test_lines_of_texts_and_images(folder, source, tmp_path):
    """Batches that the model takes, with a token for each merged patch; and lines that are none."""
    for name, size in (("a.png", (64, 64)), ("b.png", (70, 40))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    lines = [{"text": "what colour is it? red"}, {"text": "two: red", "images": ["a.png", "b.png"]}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    batches = Calibration(source, str(path), 8).batches(torch.float32)
    model = quantize.load_source(source, torch.float32).eval()
    assert len(batches) == 2
    for batch in batches:
        assert model(**batch).loss.isfinite()
    images = batches[1]["input_ids"] == model.config.image_token_id
    assert int(images.sum()) == int(batches[1]["image_grid_thw"].prod(1).sum()) // 4
    assert (batches[1]["labels"][images] == -100).all()
    for bad in ("not JSON", '["a"]', '{"images": []}', '{"text": 3}', '{"text": "x", "images": ["none.png"]}'):
        path.write_text(json.dumps(lines[0]) + "\n" + bad)
        with pytest.raises(ValueError, match=r"--calibrate: .*data\.jsonl, line 2: "):
            Calibration(source, str(path), 8)
