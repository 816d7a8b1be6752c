"""What the names of a checkpoint's modules tell: in which part of the model one stands, whether it is a linear, and
with which others a server makes it one product."""

from __future__ import annotations

from collections.abc import Iterable

#: Where a linear stands. "merger": everything between the vision tower and the text, DeepStack's mergers too.
PARTS = ("text", "vision", "merger", "lm_head")
#: What servers join along the output features → of which modules.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
#: Linears whose *inputs* are split under tensor parallelism; of the others the outputs are.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "proj", "linear_fc2", "fc2")
TOWERS = ("visual", "vision_tower")
_MERGERS = (".merger.", ".deepstack_merger_list.", ".multi_modal_projector.")


def part_of(name: str) -> str:
    """The part in which a module stands."""
    dotted = f".{name}."
    if dotted.endswith(".lm_head."):
        return "lm_head"
    if any(merger in dotted for merger in _MERGERS):
        return "merger"
    return "vision" if any(f".{tower}." in dotted for tower in TOWERS) else "text"


def is_router(name: str) -> bool:
    """A mixture's router, which chooses experts: no scheme is worth another choice."""
    return name.endswith(".mlp.gate")


def is_embedding(name: str) -> bool:
    """A table that is looked up, though it is a matrix as a linear's weight is."""
    own = name.rpartition(".")[2]
    return "embed" in own or own in ("wte", "wpe", "class_embedding")


def is_row_parallel(name: str) -> bool:
    return name.rpartition(".")[2] in _ROW_PARALLEL


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Name of the product that a server makes of several modules → those, of ``names``; a group that is not whole is
    there all the same, and a module that is fused with none is left out."""
    there = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        above, dot, own = name.rpartition(".")
        for joined, parts in FUSED.items():
            if own in parts:
                found[f"{above}{dot}{joined}"] = tuple(
                    f"{above}{dot}{part}" for part in parts if f"{above}{dot}{part}" in there
                )
    return found
