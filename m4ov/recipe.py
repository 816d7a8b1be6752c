"""The configuration trees that recipes fill: plain dataclasses, checked when they are made. No torch here.

A recipe names what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass
class RunConfig:
    """Where a run lives. The same command on the same folder goes on where it was."""

    folder: str = "runs/quickstart"
    seed: int = 0
    threads: int = 0  # of PyTorch; 0: as many as the process may use


@dataclass
class DataConfig:
    """Questions on pictures of shapes (easy-vqa, "general") and scanned digits (scikit-learn, "domain")."""

    easy_vqa: str = ""  # folder laid out as easy-vqa's data; empty: the installed package
    on_bad_image: str = "refuse"  # a missing or truncated image: "refuse" to run, or "skip" it with its questions
    image_size: int = 64  # pixels a side; smaller images are scaled up
    held_out_digits: int = 360  # of 1,797
    split_seed: int = 0  # which digits are held out; apart from run.seed, so that runs can be compared
    vocabulary: int = 512  # at most; byte-level BPE
    images_per_step: int = 60  # of all pools
    questions_per_image: int = 2  # asked of one image in one step; they share its features and do not see each other
    flip: bool = True  # mirror half of the shape images; never one that is asked about its left or right
    shift: int = 6  # move digits by up to so many pixels

    def __post_init__(self) -> None:
        _require(self.on_bad_image in ("refuse", "skip"), "data.on_bad_image", "refuse or skip", self.on_bad_image)
        for name in ("image_size", "images_per_step", "questions_per_image"):
            _require(getattr(self, name) > 0, f"data.{name}", "at least 1", getattr(self, name))
        _require(0 < self.held_out_digits < 1797, "data.held_out_digits", "1 to 1796", self.held_out_digits)
        _require(self.vocabulary >= 300, "data.vocabulary", "at least 300 (256 bytes, 8 special)", self.vocabulary)
        _require(0 <= self.shift < self.image_size, "data.shift", "0 to image_size - 1", self.shift)


@dataclass
class VisionConfig:
    hidden_size: int = 128
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    patch_size: int = 8
    merge_size: int = 2
    deepstack_layers: list[int] = field(default_factory=lambda: [1])


@dataclass
class TextConfig:
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2  # 6 and 2: two tensor ranks can share them
    head_dim: int = 32
    num_experts: int = 0  # of each layer, in the place of its MLP; 0: dense
    num_experts_per_tok: int = 2  # of them that a token goes to
    moe_intermediate_size: int = 128  # width of one expert
    router_aux_loss_coef: float = 0.001  # weight of the loss that asks that experts be chosen equally often

    def __post_init__(self) -> None:
        count, chosen = self.num_experts, self.num_experts_per_tok
        _require(count >= 0, "model.text.num_experts", "at least 0", count)
        if count:
            _require(1 <= chosen <= count, "model.text.num_experts_per_tok", f"1 to {count}, the experts", chosen)
            width = self.moe_intermediate_size
            _require(width > 0, "model.text.moe_intermediate_size", "at least 1", width)
        _require(
            self.router_aux_loss_coef >= 0, "model.text.router_aux_loss_coef", "at least 0", self.router_aux_loss_coef
        )


@dataclass
class ModelConfig:
    """A Qwen3-VL from scratch."""

    implementation: str = "m4ov"  # what is trained: this package's model, or "transformers"' class
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    initializer_range: float = 0.06

    def __post_init__(self) -> None:
        kinds = ("m4ov", "transformers")
        _require(self.implementation in kinds, "model.implementation", " or ".join(kinds), self.implementation)
        dense = self.text.num_experts == 0 or self.implementation == "m4ov"
        _require(dense, "model.implementation", "m4ov, as model.text.num_experts is not 0", self.implementation)
        factor = self.text.head_dim
        _require(factor % 2 == 0, "model.text.head_dim", "an even number", factor)
        _require(
            self.vision.hidden_size % (4 * self.vision.heads) == 0,
            "model.vision.hidden_size",
            "a multiple of 4 * heads (rotary positions in two dimensions)",
            self.vision.hidden_size,
        )


@dataclass
class OptimConfig:
    """Muon for the weight matrices inside the blocks, AdamW for the rest; linear warm-up, then cosine to zero."""

    muon_lr: float = 0.012
    lr: float = 2e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.05  # of the matrices that Muon trains
    warmup_steps: int = 50
    max_grad_norm: float = 1.0


@dataclass
class TrainConfig:
    steps: int = 900  # of all stages
    precision: str = "bf16"  # of weights in use, activations and gradients; the optimizer keeps float32 weights
    checkpoint_seconds: float = 30.0  # whichever comes first; 0: never by time
    checkpoint_steps: int = 0  # 0: never by steps
    keep_checkpoints: int = 2
    log_every: int = 10  # steps
    patch: bool = True  # with model.implementation=transformers: train with m4ov_kernels.patch
    # Parts of a step's samples that each rank takes one after the other. The step stays the same; but for the experts'
    # balance loss, which is over the tokens of a part.
    accumulate: int = 1
    peak_tflops: float = 0.0  # of one rank, that MFU is held against; 0: the GPU's data sheet, or measured
    timeout_seconds: float = 600.0  # of a collective, until the run ends with the names of the missing ranks
    wandb: str = ""  # project of Weights & Biases; empty: none
    fp8: str = "off"  # "transformer_engine": its linears, multiplying in fp8; needs that package and a CUDA device

    def __post_init__(self) -> None:
        _require(self.steps > 0, "train.steps", "at least 1", self.steps)
        _require(self.precision in ("bf16", "fp32"), "train.precision", "bf16 or fp32", self.precision)
        _require(self.fp8 in ("off", "transformer_engine"), "train.fp8", "off or transformer_engine", self.fp8)
        _require(self.keep_checkpoints > 0, "train.keep_checkpoints", "at least 1", self.keep_checkpoints)
        _require(self.log_every > 0, "train.log_every", "at least 1", self.log_every)
        _require(self.accumulate > 0, "train.accumulate", "at least 1", self.accumulate)
        _require(self.peak_tflops >= 0, "train.peak_tflops", "at least 0", self.peak_tflops)
        _require(self.timeout_seconds > 0, "train.timeout_seconds", "more than 0", self.timeout_seconds)


@dataclass
class ParallelConfig:
    """How the ranks that torchrun started share a model and its samples (m4ov/parallel/README.md draws it).

    dp_replicate · dp_shard · tp is the number of ranks. A run may go on on another layout: it is the same run.
    """

    dp_replicate: int = 0  # replicas of the model, each with samples of its own; 0: as many as the ranks make
    dp_shard: int = 1  # ranks with samples of their own that shard weights, gradients, optimizer states (FSDP, HSDP)
    tp: int = 1  # ranks that share heads, columns of the MLPs and the vocabulary
    ep: int = 1  # ranks that share the experts: of the same dp_shard · tp ranks, it adds none
    pp: int = 1  # not built yet
    cp: int = 1  # not built yet

    def __post_init__(self) -> None:
        _require(self.dp_replicate >= 0, "parallel.dp_replicate", "at least 0", self.dp_replicate)
        for name in ("dp_shard", "tp", "ep"):
            _require(getattr(self, name) >= 1, f"parallel.{name}", "at least 1", getattr(self, name))
        for name, kind in (("pp", "pipeline"), ("cp", "context")):
            expected = f"1 ({kind} parallelism is not built yet, see m4ov/parallel/README.md; dp_shard, tp and ep are)"
            _require(getattr(self, name) == 1, f"parallel.{name}", expected, getattr(self, name))


@dataclass
class EvaluateConfig:
    tokens_per_batch: int = 8192  # a packed row
    limit: int = 0  # questions of each held-out split; 0: all
    examples: int = 12  # shown in the report

    def __post_init__(self) -> None:
        _require(self.tokens_per_batch > 0, "evaluate.tokens_per_batch", "at least 1", self.tokens_per_batch)


@dataclass
class CompareConfig:
    """Patched against unpatched on the same batches."""

    steps: int = 20
    images_per_step: int = 8  # mixed as the first stage's

    def __post_init__(self) -> None:
        for name in ("steps", "images_per_step"):
            _require(getattr(self, name) > 0, f"compare.{name}", "at least 1", getattr(self, name))
