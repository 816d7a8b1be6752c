"""Which ranks of a supervised run do what: the recipe's ``parallel``, checked before there is any process group, and
the model put on it."""

from __future__ import annotations

from datetime import timedelta

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel.data import DataParallel
from m4ov.parallel.mesh import Layout, LayoutError, Mesh, ModelSizes, check
from m4ov.parallel.parallelize import Parallel, parallelize
from m4ov.recipe import QuickstartConfig
from m4ov.train import World


def layout_of(config: QuickstartConfig, ranks: int) -> Layout:
    """The layout of a run of so many ranks. Needs neither data nor a process group; whether ``tp`` divides the
    vocabulary is seen once the tokenizer is there (:func:`spread`).

    Raises:
        LayoutError: it does not fit the ranks or the model; the message has the number, and the nearest that do. Or the
            recipe trains what is only replicated.
    """
    wanted, text = config.parallel, config.model.text
    replicas = wanted.dp_replicate or max(1, ranks // (wanted.dp_shard * wanted.tp))
    layout = Layout(dp_replicate=replicas, dp_shard=wanted.dp_shard, tp=wanted.tp, ep=wanted.ep)
    sizes = ModelSizes(
        layers=text.layers,
        heads=text.heads,
        key_value_heads=text.key_value_heads,
        intermediate_size=text.intermediate_size,
        vocab_size=0,  # not known yet: every number divides it
        experts=text.num_experts,
    )
    check(layout, ranks, sizes)
    if is_split(layout):
        whole = "is trained in whole replicas only (parallel.dp_replicate)"
        if config.model.implementation != "m4ov":
            found = f"model.implementation={config.model.implementation}"
            raise LayoutError(f"layout {layout}: {found} {whole}; model.implementation=m4ov takes every layout")
        if config.train.fp8 != "off":
            raise LayoutError(f"layout {layout}: train.fp8={config.train.fp8} {whole}")
    return layout


def is_split(layout: Layout) -> bool:
    """Whether ranks have parts of the model, not all of it."""
    return layout.fold > 1


def spread(model: Qwen3VL, layout: Layout, world: World, config: QuickstartConfig) -> Mesh | None:
    """Put a model, which all ranks have, on the ranks, in place; ``world`` takes its samples from then on. Collective.

    A model of which ranks have parts keeps float32 weights, and computes with their parts rounded to
    ``train.precision``; a replicated one is left as it is.

    Returns:
        The mesh; ``None``: none is needed, as the model is on one rank, or replicated without experts, whose balance
        loss is over the tokens of all ranks.

    Raises:
        LayoutError: ``tp`` does not divide the vocabulary; before any group of the mesh is made.
    """
    if layout.world > 1:
        model.always_vision = True
    if layout.world == 1 or not (is_split(layout) or model.config.text.num_experts):
        return None
    timeout = timedelta(seconds=config.train.timeout_seconds)
    mesh = Mesh(layout, model=ModelSizes.of(model.config), timeout=timeout)
    world.follow(mesh)
    if is_split(layout):
        half = DataParallel(param_dtype="bfloat16", reduce_dtype="float32")
        data = half if config.train.precision == "bf16" else DataParallel()
        parallelize(model.float(), mesh, Parallel(data=data))
    return mesh
