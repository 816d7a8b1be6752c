"""What a Qwen3-VL is made of: frozen dataclasses, to and from Hugging Face's ``config.json``; the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ConfigurationError(ValueError):
    """A configuration is not one of a Qwen3-VL that is built here; the message names the key."""


def _require(ok: bool, name: str, expected: str, value: object) -> None:
    if not ok:
        raise ConfigurationError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class VisionConfig:
    """The tower. Names are those of Hugging Face's ``vision_config``.

    Attributes:
        depth, hidden_size, intermediate_size, num_heads: of its blocks.
        in_channels, temporal_patch_size, patch_size: of one patch, ``[C, T, P, P]``.
        spatial_merge_size: patches a side of one feature.
        out_hidden_size: width of the features, that of the language model.
        num_position_embeddings: rows of the learned table, a square.
        deepstack_visual_indexes: blocks whose output goes to the first layers of the language model, in that order.
        rope_theta: base of the rotary frequencies.
    """

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            *("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size"),
            *("temporal_patch_size", "spatial_merge_size", "out_hidden_size", "num_position_embeddings"),
        ):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"vision_config.{name}", "a positive integer", value)
        heads, side = 4 * self.num_heads, round(self.num_position_embeddings**0.5)
        expected = f"a multiple of 4 · num_heads = {heads} (rotary positions in two dimensions)"
        _require(self.hidden_size % heads == 0, "vision_config.hidden_size", expected, self.hidden_size)
        name = "vision_config.num_position_embeddings"
        _require(side * side == self.num_position_embeddings, name, "a square number", self.num_position_embeddings)
        indexes = list(self.deepstack_visual_indexes)
        ok = all(isinstance(index, int) and 0 <= index < self.depth for index in indexes)
        expected = f"different blocks, of 0 to {self.depth - 1}"
        _require(ok and len(set(indexes)) == len(indexes), "vision_config.deepstack_visual_indexes", expected, indexes)

    @property
    def patch_values(self) -> int:
        """Values in one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model. Names are those of Hugging Face's ``text_config``.

    Attributes:
        num_experts: of each sparse layer; 0: every layer is dense.
        num_experts_per_tok: how many of them a token goes to.
        moe_intermediate_size: width of one expert.
        mlp_only_layers, decoder_sparse_step: which layers are dense though there are experts: those that are named, and
            those whose number, from 1, is no multiple of the step.
        router_aux_loss_coef: weight of the experts' balance loss.
        mrope_section: how many of a head's frequencies belong to time, height and width; they alternate.
        pad_token_id: its embedding gets no gradient, as Hugging Face's does not.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    attention_bias: bool = False
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    router_aux_loss_coef: float = 0.001
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "decoder_sparse_step"),
        ):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"text_config.{name}", "a positive integer", value)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        _require(heads % groups == 0, "text_config.num_key_value_heads", f"a divisor of {heads}", groups)
        _require(self.head_dim % 2 == 0, "text_config.head_dim", "an even number", self.head_dim)
        section = list(self.mrope_section)
        expected = f"three counts with the sum {self.head_dim // 2}, half of head_dim"
        ok = len(section) == 3 and sum(section) == self.head_dim // 2
        _require(ok, "text_config.rope_parameters.mrope_section", expected, section)
        if self.num_experts:
            count, width = self.num_experts_per_tok, self.moe_intermediate_size
            _require(
                0 < count <= self.num_experts, "text_config.num_experts_per_tok", f"1 to {self.num_experts}", count
            )
            _require(width > 0, "text_config.moe_intermediate_size", "a positive integer", width)

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )


@dataclass(frozen=True)
class Config:
    """A Qwen3-VL, dense or with a mixture of experts.

    Attributes:
        tie_word_embeddings: whether the head's weight is that of the token embedding.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        width = self.text.hidden_size
        expected = f"{width}, the hidden_size of text_config"
        _require(
            self.vision.out_hidden_size == width, "vision_config.out_hidden_size", expected, self.vision.out_hidden_size
        )
        count, layers = len(self.vision.deepstack_visual_indexes), self.text.num_hidden_layers
        expected = f"at most {layers}, one for each layer of text_config"
        _require(count <= layers, "vision_config.deepstack_visual_indexes", expected, f"{count} of them")

    @property
    def model_type(self) -> str:
        return "qwen3_vl_moe" if self.text.num_experts else "qwen3_vl"

    @classmethod
    def preset(cls, name: str) -> Config:
        """A published size: ``"2b"``, ``"4b"``, ``"8b"``, ``"32b"``, ``"30b-a3b"`` or ``"235b-a22b"``.

        Raises:
            ConfigurationError: there is none of this name.
        """
        found = _PRESETS.get(name)
        if found is None:
            raise ConfigurationError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Config:
        """Of Hugging Face's ``config.json``, of transformers 4.57 (``rope_scaling``) or 5 (``rope_parameters``).

        Raises:
            ConfigurationError: it is of another model, or asks for something that is not built here; names the key.
        """
        kind = found.get("model_type")
        _require(kind in _TYPES, "model_type", " or ".join(_TYPES), kind)
        _require("quantization_config" not in found, "quantization_config", "none: unquantised weights", "one")
        text, vision = _section(found, "text_config"), _section(found, "vision_config")
        _expect(text, "text_config", hidden_act="silu", attention_dropout=0, use_sliding_window=False)
        _expect(vision, "vision_config", hidden_act="gelu_pytorch_tanh")
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        default = {"type": "default", "rope_type": "default", "mrope_interleaved": True, "partial_rotary_factor": 1}
        _expect(rope, "text_config.rope_parameters", **default)
        values = _fields(TextConfig, text, "text_config")
        values["rope_theta"] = float(rope.get("rope_theta", text.get("rope_theta", 500000.0)))
        values["mrope_section"] = tuple(rope.get("mrope_section", (24, 20, 20)))
        if kind == "qwen3_vl_moe":
            values["num_experts"] = text.get("num_experts", text.get("num_local_experts", 60))
            _require(values["num_experts"] > 0, "text_config.num_experts", "a positive integer", values["num_experts"])
        else:
            _require(
                not values.get("num_experts"), "text_config.num_experts", f"none in a {kind}", text.get("num_experts")
            )
        seen = _fields(VisionConfig, vision, "vision_config")
        theta = (vision.get("rope_parameters") or {}).get("rope_theta")
        seen |= {} if theta is None else {"rope_theta": float(theta)}
        own = _fields(Config, found, "")
        own["tie_word_embeddings"] = found.get("tie_word_embeddings", False)
        return cls(text=TextConfig(**values), vision=VisionConfig(**seen), **own)

    def to_dict(self) -> dict[str, Any]:
        """As Hugging Face's ``config.json`` has it, readable by transformers 5."""
        text, vision = (
            {name: list(value) if isinstance(value, tuple) else value for name, value in vars(part).items()}
            for part in (self.text, self.vision)
        )
        theta, section = text.pop("rope_theta"), text.pop("mrope_section")
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": theta,
            "mrope_section": section,
            "mrope_interleaved": True,
        }
        if not self.text.num_experts:
            for name in _OF_EXPERTS:
                del text[name]
        theta = vision.pop("rope_theta")
        if theta != 10000.0:  # transformers 5.14 knows no other, and no such key
            vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        kind = self.model_type
        text |= {"model_type": f"{kind}_text", "hidden_act": "silu", "tie_word_embeddings": self.tie_word_embeddings}
        vision |= {"model_type": f"{kind}_vision", "hidden_act": "gelu_pytorch_tanh"}
        own = {name: getattr(self, name) for name in _OWN}
        return {
            "architectures": [_TYPES[kind]],
            "model_type": kind,
            **own,
            "text_config": text,
            "vision_config": vision,
        }


_TYPES = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration"}
_OWN = (
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    "tie_word_embeddings",
)
_OF_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step"),
    "router_aux_loss_coef",
)


def _section(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = found.get(name)
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"{name}: expected a mapping, got {section!r}")
    return section


def _expect(section: Mapping[str, Any], where: str, **expected: Any) -> None:
    """What is not built here must not be asked for."""
    for name, value in expected.items():
        found = section.get(name)
        _require(found is None or found == value, f"{where}.{name}", repr(value), found)


def _fields(kind: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a section that a dataclass has, lists as tuples; every size must be there."""
    values = {}
    for item in dataclasses.fields(kind):
        if item.name in section and (section[item.name] is not None or item.default is None):
            value = section[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
        elif item.name in _SIZES and where:
            raise ConfigurationError(f"{where}.{item.name}: expected a value, got none")
    return values


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "depth", "num_heads", "out_hidden_size"),
)


def _preset(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    groups: int,
    *,
    small: bool = False,
    tie: bool = False,
    expert: int = 0,
) -> Config:
    """``small``: the vision tower of the two small ones; ``expert``: the width of each of 128, of which 8 are taken."""
    experts: dict[str, Any] = (
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert} if expert else {}
    )
    tower: dict[str, Any] = (
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": (5, 11, 17)}
        if small
        else {}
    )
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **experts,
    )
    return Config(text, VisionConfig(out_hidden_size=hidden, **tower), tie_word_embeddings=tie)


_PRESETS = {
    "2b": _preset(2048, 6144, 28, 16, 8, small=True, tie=True),
    "4b": _preset(2560, 9728, 36, 32, 8, small=True, tie=True),
    "8b": _preset(4096, 12288, 36, 32, 8),
    "32b": _preset(5120, 25600, 64, 64, 8),
    "30b-a3b": _preset(2048, 6144, 48, 32, 4, expert=768),
    "235b-a22b": _preset(4096, 12288, 94, 64, 4, expert=1536),
}
