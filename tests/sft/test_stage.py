"""A stage: what is frozen stays, what is averaged is the average, what LoRA learns is merged; on two ranks too."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from m4ov.data import Mixture
from m4ov.manifest import PARTS, AverageConfig, LoraConfig, StageConfig
from m4ov.models.qwen3_vl import from_pretrained, new
from m4ov.parallel import ranks
from m4ov.parallel.checkpoint import checkpoints, read
from m4ov.parallel.mesh import Layout, LayoutError
from m4ov.recipe import ParallelConfig
from m4ov.sft import check, lora
from m4ov.sft.average import Average
from m4ov.sft.decisions import DecisionLog
from m4ov.sft.decisions import read as read_decisions
from m4ov.sft.parts import freeze, part_of
from m4ov.sft.stage import Place, run_stage
from m4ov.train import World
from m4ov.train.metrics import read as read_metrics
from tests.sft import small
from tests.tiny_task import equal_states, quiet, weights_of


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder, stage: StageConfig, precision: str = "fp32", start=None, most: int = 4, **place):
    """A stage of its own; the weights that it began with, and its end."""
    material = small.material(precision)
    if start is None:
        start = weights_of(material.task, 3)
    at = {"number": 1, "name": "stage", "offset": 0, "most": most, "budget": 8, "images": 6, "seed": 5, **place}
    end = run_stage(
        stage,
        Place(**at),
        material.pools,
        start,
        config=small.config({"only": small.two_stages()}, precision),
        task=material.task,
        layout=Layout(),
        measure=small.measure,
        log=DecisionLog(folder / "decisions.jsonl"),
        folder=folder,
        console=quiet(),
        world=World(),
    )
    return start, end


def both(**changes) -> StageConfig:
    return StageConfig(mixture={"general": 1.0, "domain": 1.0}, steps=2, warmup=1, **changes)


@pytest.mark.parametrize(
    ("frozen", "precision"), [(["vision"], "bf16"), (["merger", "language"], "fp32"), (["embeddings"], "fp32")]
)
def test_what_is_frozen_keeps_its_bits(tmp_path, frozen, precision):
    start, end = run(tmp_path, both(freeze=frozen), precision)
    assert end.weights.keys() == start.keys()
    for name, weight in end.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, start[name]) == (part_of(name) in frozen), name
    kept = {name for name, _ in read(checkpoints(tmp_path / "checkpoints")[-1])}
    assert kept == {name for name in start if part_of(name) not in frozen}


def test_every_parameter_has_a_part():
    model = new(small.material().task.config, seed=0)
    found = {part_of(name) for name, _ in model.named_parameters()}
    assert found == set(PARTS)
    freeze(model, ["vision", "language"])
    assert {part_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"merger", "embeddings"}
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("model.audio.weight")


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_the_average_is_what_its_definition_says(kind):
    """In float64, over two rounds of three steps and one step of a third."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(5, 3), "b": torch.randn(4)}
    average = Average(AverageConfig(kind, decay=0.9), weights, round_steps=3)
    average.begin()
    expected = {name: weight.double().clone() for name, weight in weights.items()}
    history: list[dict[str, torch.Tensor]] = []
    for done in range(1, 8):
        for weight in weights.values():
            weight.add_(torch.randn_like(weight))
        history.append({name: weight.double().clone() for name, weight in weights.items()})
        average.after_step(done)
        for name in weights:
            if kind == "ema":
                expected[name] = 0.9 * expected[name] + 0.1 * history[-1][name]
            else:
                of_round = history[(done - 1) // 3 * 3 :]
                expected[name] = sum(row[name] for row in of_round) / len(of_round)
            torch.testing.assert_close(average.averages[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_stage_hands_on_its_average_and_is_measured_by_it(tmp_path):
    _, plain = run(tmp_path / "plain", both())
    _, averaged = run(tmp_path / "ema", both(average=AverageConfig("ema", 0.5)))
    assert equal_states(averaged.result.weights, plain.result.weights)  # the average leaves the training alone
    states = dict(read(checkpoints(tmp_path / "ema" / "checkpoints")[-1], prefix="average."))
    assert states.keys() == averaged.weights.keys()
    different = [name for name, weight in averaged.weights.items() if not torch.equal(weight, plain.weights[name])]
    assert len(different) > 0.9 * len(averaged.weights)
    assert equal_states({name: averaged.weights[name] for name in states}, states)
    model = new(small.material().task.config, seed=0)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(averaged.weights[name])
    assert small.measure(model) == averaged.figures != plain.figures


def test_the_next_stage_begins_with_the_float32_weights(tmp_path):
    """Not with those that the model computes with."""
    _, end = run(tmp_path / "one", both(), "bf16", most=2)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in end.weights.values())
    start, other = run(tmp_path / "two", both(freeze=["vision"]), "bf16", start=end.weights, most=2, number=2, offset=2)
    assert all(torch.equal(other.weights[name], start[name]) for name in start if part_of(name) == "vision")
    moved = [(other.weights[name] - start[name]).abs().max() for name in start if part_of(name) == "language"]
    assert max(moved) < 0.1


def test_the_learning_rate_is_the_arms_cosine_times_the_stages(tmp_path):
    run(tmp_path, replace(both(learning_rate=0.5), warmup=2), offset=4, most=4)
    rows = {row["step"]: row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    for step in range(4):
        cosine = 0.5 * (1 + math.cos(math.pi * (4 + step) / 8))
        assert rows[step + 1] == pytest.approx(1e-3 * 0.5 * cosine * min(1.0, (step + 1) / 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_trains_and_keeps_its_factors_alone_and_is_merged(tmp_path, precision):
    options = LoraConfig(rank=2, alpha=8, targets=["q_proj", "down_proj", "linear_fc1"])
    stage = both(lora=options, freeze=["vision"], learning_rate=20.0)
    start, end = run(tmp_path, stage, precision)
    kept = {name for name, _ in read(checkpoints(tmp_path / "checkpoints")[-1])}
    assert kept == end.result.weights.keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in kept)
    changed = {name for name in start if not torch.equal(start[name], end.weights[name])}
    adapted = {name.partition(".lora_")[0] + ".weight" for name in kept}
    assert changed == adapted
    assert {part_of(name) for name in changed} == {
        "language",
        "merger",
    }  # the tower is frozen, and has a linear_fc1 too
    # What the adapters compute is what the merged weights compute.
    material = small.material()
    batch = Mixture(
        list(material.pools.values()), {"general": 3, "domain": 3}, material.task.encoder, seed=1, dtype=torch.float32
    ).batch(0)
    with_adapters, merged = new(material.task.config, seed=0), new(material.task.config, seed=0)
    for model, weights in ((with_adapters, start), (merged, end.weights)):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
    with torch.no_grad():
        before = with_adapters(batch).hidden_states
        lora.attach(with_adapters, options, ["vision"], seed=0)
        for name, parameter in with_adapters.named_parameters():
            if name in end.result.weights:
                parameter.copy_(end.result.weights[name])
        adapted_states, merged_states = with_adapters(batch).hidden_states, merged(batch).hidden_states
    assert (adapted_states - before).norm() > 1e-3 * before.norm()
    assert (merged_states - adapted_states).norm() <= 1e-5 * adapted_states.norm()


def test_lora_on_what_is_not_there(tmp_path):
    model = new(small.material().task.config, seed=0)
    for name, near in (("q_porj", "did you mean q_proj"), ("lm_head", "linears: "), ("qkv", "linears: ")):
        with pytest.raises(ValueError, match=rf"lora\.targets: no linear that is trained is named '{name}'; {near}"):
            lora.attach(model, LoraConfig(rank=2, targets=[name]), ["vision"], seed=0)


def test_a_gate_that_opens_ends_the_stage(tmp_path):
    stage = small.narrow(small.two_stages()).stages["first"]
    stage.targets["domain"].at_least = 1e-12  # the weights' sum alone reaches it
    stage.guards["general"].epsilon = 0.99
    _, end = run(tmp_path, stage, most=6)
    assert (end.action, end.result.steps) == ("end", 2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    rows = read_decisions(tmp_path / "decisions.jsonl")
    assert [(row["round"], row["action"]) for row in rows] == [(0, "begin"), (1, "end")]
    assert rows[1]["figures"] == end.figures
    assert rows[1]["targets"]["domain"]["holds"]
    _, again = run(tmp_path, stage, most=6)  # nothing left to do
    assert equal_states(again.weights, end.weights)
    assert (again.figures, again.result.resumed_at) == (end.figures, 2)
    assert read_decisions(tmp_path / "decisions.jsonl") == rows


def test_replay_rises_and_changes_the_steps(tmp_path):
    stage = small.narrow(small.two_stages()).stages["first"]
    ends, asked = [], iter([0.5, 0.4, 0.4, 0.5])  # the start; lost; lost; back

    def measured(model):
        return {"general": next(asked), "domain": 0.1}

    original, small.measure = small.measure, measured
    try:
        ends.append(run(tmp_path, stage, most=6)[1])
    finally:
        small.measure = original
    rows = read_decisions(tmp_path / "decisions.jsonl")
    assert [row["action"] for row in rows] == ["begin", "raise replay", "raise replay", "stop"]
    assert [row["next_replay"]["general"] for row in rows] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert [row["next_images"] for row in rows] == [
        {"domain": 5, "general": 1},
        {"domain": 4, "general": 2},
        {"domain": 2, "general": 4},
        {"domain": 2, "general": 4},
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The arm on one process: its end, its decisions and its weights."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = small.train_arm(folder)
    finally:
        torch.set_num_threads(threads)
    return end, *left(folder)


def left(folder) -> tuple[list[dict], dict[str, torch.Tensor]]:
    home = folder / "curriculum"
    return read_decisions(home / "decisions.jsonl"), load_file(home / "model" / "model.safetensors")


def train_on_ranks(folder, parallel: ParallelConfig):
    return small.train_arm(folder, parallel=parallel)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(dp_shard=2), ParallelConfig(tp=2)],
    ids=["dp2", "fsdp2", "tp2"],
)
def test_two_ranks_decide_and_end_as_one_process(tmp_path, alone, parallel):
    """Through two stages, of which one raises replay, and the other hands on its average."""
    reference, decisions, weights = alone
    end, other = ranks.run(train_on_ranks, 2, tmp_path, parallel)
    assert (end.steps, end.figures) == (other.steps, other.figures)
    assert (end.steps, end.tokens) == (reference.steps, reference.tokens)
    rows, found = left(tmp_path)
    assert [(row["stage"], row["round"]) for row in rows] == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2)]
    for row, expected in zip(rows, decisions, strict=True):
        assert row["figures"] == pytest.approx(expected["figures"], rel=1e-6)
        assert {k: row[k] for k in ("action", "next_images")} == {k: expected[k] for k in ("action", "next_images")}
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        # AdamW divides gradients by their size, those of the keys' biases too, which are nothing but rounding.
        far = 1e-1 if name.endswith("attn.qkv.bias") else 1e-4
        assert (found[name] - weight).norm() <= far * weight.norm(), name
    model = from_pretrained(tmp_path / "curriculum" / "model")
    assert equal_states(dict(model.named_parameters()), {name: found[name] for name, _ in model.named_parameters()})


def test_lora_under_a_layout_that_splits_the_model_is_refused_before_the_ranks_join():
    arm = small.two_stages()
    arm.stages["second"].lora.rank = 2
    config = small.config({"curriculum": arm})
    assert str(check(config, 2)) == "dp2"
    config.parallel = ParallelConfig(tp=2)
    named = r"layout tp2: arms\.curriculum\.stages\.second\.lora\.rank=2 is trained in whole replicas only"
    with pytest.raises(LayoutError, match=named):
        check(config, 2)
