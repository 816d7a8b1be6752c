"""The recipe's layouts: a stage on each trains and measures as on one process, goes on where another stopped, and
writes the same model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from m4ov import config, quickstart, sft
from m4ov.data import Split
from m4ov.models.qwen3_vl import forward, from_pretrained, new, qwen3_vl_config
from m4ov.parallel import ranks
from m4ov.parallel.mesh import Layout, LayoutError
from m4ov.quickstart_recipe import QuickstartConfig
from m4ov.recipe import ParallelConfig
from m4ov.sft.decisions import read as read_decisions
from m4ov.sft.layout import spread
from m4ov.sft.task import DTYPES
from m4ov.sft.training import loss_of
from m4ov.train.metrics import read as read_metrics
from tests.tiny_task import mixture_batch, tiny_config, tiny_material, train_stage
from tests.train import small

STEPS, STOP = 4, 2


class Run(NamedTuple):
    """``source``: the run on whose layout the first two steps were made."""

    layout: str
    experts: int = 0
    precision: str = "fp32"
    source: str = ""

    @property
    def name(self) -> str:
        kind = "moe" if self.experts else "dense"
        return " ".join([self.layout, kind, self.precision, *([f"from {self.source}"] if self.source else [])])

    def config(self, folder: Path) -> QuickstartConfig:
        made = tiny_config(folder / self.name, precision=self.precision, steps=STEPS, checkpoint_steps=STOP)
        made.train.keep_checkpoints, made.train.peak_tflops = STEPS, 1.0
        layout, axes = Layout.parse(self.layout), ("dp_replicate", "dp_shard", "tp", "ep")
        made.parallel = ParallelConfig(**{axis: getattr(layout, axis) for axis in axes})
        text = made.model.text
        # The balance loss is given weight, so that it is seen.
        text.num_experts, text.moe_intermediate_size, text.router_aux_loss_coef = self.experts, 24, 0.05
        stage = made.stages["all"]
        stage.steps, stage.warmup = STOP, 50
        if not self.experts:  # these go on with all their weights
            stage.freeze, stage.average.kind, stage.average.decay = ["merger"], "ema", 0.5
        return made


ONE = [Run("1"), Run("1", experts=4), Run("1", experts=4, precision="bf16")]
TWO = [Run("fsdp2"), Run("tp2"), Run("dp2", experts=4), Run("fsdp2-ep2", experts=4)]
ROUNDED = Run("tp2-ep2", experts=4, precision="bf16")
FOUR = [
    Run("dp2-fsdp2"),
    Run("fsdp2-tp2", source=TWO[0].name),
    Run("fsdp2-tp2-ep4", experts=4, source=TWO[3].name),
]
BACK = Run("1", source=TWO[1].name)


def train(folder: Path, material: sft.Material, runs: Sequence[Run]) -> None:
    """One after the other, on all ranks that there are."""
    torch.set_num_threads(1)
    for run in runs:
        made, task = run.config(folder), material.task
        model_config = qwen3_vl_config(made.model, task.tokenizer, grid=task.geometry.grid_thw[1])
        own = replace(task, model_config=model_config, dtype=DTYPES[run.precision])
        train_stage(made, folder / run.name, replace(material, task=own), small.world())
        if dist.is_initialized():
            dist.barrier()


def refuse_and_train(folder: Path, material: sft.Material, runs: Sequence[Run]) -> str:
    """How two tensor ranks refuse an odd vocabulary; then as :func:`train`."""
    values = material.task.config
    model = new(replace(values, text=replace(values.text, vocab_size=333)))
    with pytest.raises(LayoutError) as refused:
        spread(model, Layout(tp=2), small.world(), Run("tp2").config(folder).train)
    train(folder, material, runs)
    return str(refused.value)


def few_images() -> sft.Material:
    """Material that is small enough to be sent to each rank."""

    def few(split: Split) -> Split:
        return replace(split, images=split.images[:48], samples=tuple(one for one in split.samples if one.image < 48))

    whole = tiny_material()
    pools = {name: replace(pool, split=few(pool.split)) for name, pool in whole.pools.items()}
    gates = {name: few(split) for name, split in whole.gates.items()}
    return replace(whole, pools=pools, gates=gates, tests={})


def move(folder: Path, runs: Sequence[Run]) -> None:
    """What their sources had saved after two steps."""
    for run in runs:
        if run.source:
            step = f"checkpoints/step-{STOP:08d}"
            shutil.copytree(folder / run.source / step, folder / run.name / step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of all runs, and how an odd vocabulary was refused."""
    folder, material = tmp_path_factory.mktemp("layouts"), few_images()
    threads = torch.get_num_threads()
    try:
        train(folder, material, ONE)
        refused = ranks.run(refuse_and_train, 2, folder, material, [*TWO, ROUNDED], timeout=120)
        move(folder, [*FOUR, BACK])
        ranks.run(train, 4, folder, material, FOUR, timeout=120)
        train(folder, material, [BACK])
    finally:
        torch.set_num_threads(threads)
    return folder, refused


@pytest.fixture
def folder(trained) -> Path:
    return trained[0]


def losses(folder: Path, run: Run) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(folder / run.name / "metrics.jsonl")}


def measured(folder: Path, run: Run) -> list[dict]:
    return read_decisions(folder / run.name / "decisions.jsonl")


@pytest.mark.parametrize("run", [*TWO, *FOUR, BACK], ids=lambda run: run.name)
def test_every_layout_trains_as_one_process_does(folder, run):
    reference = Run("1", experts=run.experts)
    wanted, found = losses(folder, reference), losses(folder, run)
    assert list(found) == list(range(STOP + 1 if run.source else 1, STEPS + 1))
    assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-6)
    one, other = ({row["step"]: row["figures"] for row in measured(folder, each)} for each in (reference, run))
    assert list(other) == [step for step in (0, STOP, STEPS) if step > (STOP if run.source else -1)]
    for step, figures in other.items():
        assert figures == pytest.approx(one[step], rel=1e-6)
    one, other = (load_file(folder / each.name / "model" / "model.safetensors") for each in (reference, run))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        difference = (other[name] - weight).norm()
        assert difference <= tolerance(name) * weight.norm(), f"{name}: {difference / weight.norm():.1e}"


def tolerance(name: str) -> float:
    # AdamW makes steps of ±lr of gradients that are zero but for rounding: those of the keys' biases, which no
    # softmax sees.
    return 1e-1 if name.endswith("attn.qkv.bias") else 1e-5


def test_halved_weights_train_much_alike(folder):
    """Of float32 weights that are sharded, the parts that compute are bfloat16."""
    full, one, many = (losses(folder, run) for run in (ONE[1], ONE[2], ROUNDED))
    assert many == pytest.approx(one, rel=2e-2)
    assert many != pytest.approx(full, rel=1e-6)


def test_a_model_with_experts_is_one_of_transformers(folder):
    """Written by ranks that had some of its experts each; loss and balance loss are transformers' own."""
    run = TWO[3]
    ours = from_pretrained(folder / run.name / "model")
    theirs = AutoModelForImageTextToText.from_pretrained(folder / run.name / "model")
    assert type(theirs).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert ours.config.text.router_aux_loss_coef == 0.05
    theirs.config.text_config.output_router_logits = True
    batch = mixture_batch(0)
    with torch.no_grad():
        total, labels = loss_of(ours, batch)
        balanced = forward(theirs, batch).loss
        bare = ours.loss(batch).total
    assert float(total / labels) == pytest.approx(float(balanced), rel=1e-5)
    assert float(total) > float(bare) + 0.05 * labels  # balanced it is 2, the experts of a token


def recipe(*overrides: str) -> QuickstartConfig:
    return config.load(QuickstartConfig, "quickstart", overrides)


def layout_in(found: QuickstartConfig, started: int) -> Layout:
    return sft.check(found.manifest(), started)


EXPERTS = "model.text.num_experts=4"


@pytest.mark.parametrize(
    ("overrides", "started", "layout"),
    [
        ([], 1, "1"),
        ([], 4, "dp4"),
        (["parallel.dp_shard=2"], 2, "fsdp2"),
        (["parallel.dp_shard=2"], 4, "dp2-fsdp2"),
        (["parallel.dp_replicate=2", "parallel.tp=2"], 4, "dp2-tp2"),
        ([EXPERTS, "parallel.dp_shard=2", "parallel.ep=2"], 4, "dp2-fsdp2-ep2"),
        (["model.implementation=transformers"], 2, "dp2"),
    ],
)
def test_replicas_are_what_is_left(overrides, started, layout):
    assert str(layout_in(recipe(*overrides), started)) == layout


@pytest.mark.parametrize(
    ("overrides", "started", "problem", "near"),
    [
        (["parallel.tp=4"], 4, "layout tp4: tp 4 does not divide the 6 attention heads", "fsdp4"),
        (["parallel.dp_shard=3"], 4, "layout fsdp3: it has 3 ranks (dp_shard 3), the world has 4", "fsdp4"),
        (["parallel.tp=2"], 1, "layout tp2: it has 2 ranks (tp 2), the world has 1", "1"),
        (["parallel.tp=3"], 3, "layout tp3: tp 3 does not divide the 2 key-value heads", "fsdp3"),
        (["parallel.dp_shard=2", "parallel.ep=2"], 2, "layout fsdp2-ep2: ep 2 needs experts", "fsdp2"),
        (
            [EXPERTS, "parallel.dp_shard=8", "parallel.ep=8"],
            8,
            "layout fsdp8-ep8: ep 8 does not divide the 4 experts",
            "fsdp8-ep4",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_the_ranks_join(overrides, started, problem, near, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(started))
    with pytest.raises(LayoutError) as refused:
        quickstart.run(recipe(*overrides))
    message = str(refused.value)
    assert message.startswith(problem)
    assert near in message.partition("nearest legal layouts of ")[2]
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.implementation=transformers"], "model.implementation=transformers is trained in whole replicas only"),
        (["train.fp8=transformer_engine"], "train.fp8=transformer_engine is trained in whole replicas only"),
    ],
)
def test_what_is_only_replicated_is_refused_with_a_layout(overrides, problem):
    with pytest.raises(LayoutError) as refused:
        layout_in(recipe("parallel.dp_shard=2", *overrides), 2)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "parallel.pp=2",
            r"parallel\.pp: expected 1 \(pipeline parallelism is not built yet, see m4ov/parallel/README\.md",
        ),
        ("parallel.cp=2", r"parallel\.cp: expected 1 \(context parallelism is not built yet"),
        ("parallel.tp=0", r"parallel\.tp: expected at least 1, got 0"),
        ("model.text.num_experts_per_tok=5", r"num_experts_per_tok: expected 1 to 4, the experts, got 5"),
        (
            "model.implementation=transformers",
            r"model\.implementation: expected m4ov, as model\.text\.num_experts is not 0",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(override, problem):
    with pytest.raises(config.ConfigError, match=problem):
        recipe(EXPERTS, override)


def test_the_layout_is_not_what_a_run_is():
    known = quickstart.fingerprint(recipe())
    for same in ("parallel.dp_shard=2", "run.folder=elsewhere", "train.checkpoint_seconds=5", "evaluate.limit=3"):
        assert quickstart.fingerprint(recipe(same)) == known
    for other in (EXPERTS, "optim.lr=0.5", "stages.restore.rounds=1", "production.allot.questions=9", "scale=0.5"):
        assert quickstart.fingerprint(recipe(other)) != known


def test_a_vocabulary_that_does_not_divide_is_refused_before_the_mesh_is_made(trained):
    for message in trained[1]:
        assert "tp 2 does not divide the 333 words of the vocabulary" in message
