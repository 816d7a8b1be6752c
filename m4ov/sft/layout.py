"""Which ranks of a supervised run do what: a recipe's ``parallel``, checked before there is any process group, and the
model put on it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from m4ov.models.qwen3_vl import Qwen3VL
from m4ov.parallel.data import DataParallel
from m4ov.parallel.mesh import Layout, LayoutError, Mesh, ModelSizes, check
from m4ov.parallel.parallelize import Parallel, parallelize
from m4ov.recipe import ParallelConfig, TextConfig, TrainConfig
from m4ov.train import World


def sizes_of(text: TextConfig) -> ModelSizes:
    """What of a recipe's model must be divisible, before there is a tokenizer: every number divides the vocabulary."""
    return ModelSizes(
        layers=text.layers,
        heads=text.heads,
        key_value_heads=text.key_value_heads,
        intermediate_size=text.intermediate_size,
        vocab_size=0,
        experts=text.num_experts,
    )


def layout_of(parallel: ParallelConfig, ranks: int, sizes: ModelSizes, *, whole: Sequence[str] = ()) -> Layout:
    """The layout of a run of so many ranks. Needs neither data nor a process group.

    Args:
        sizes: of the model: :meth:`ModelSizes.of` its configuration, or :func:`sizes_of` a recipe's; whether ``tp``
            divides a vocabulary that is not known yet is seen by :func:`spread`.
        whole: what of the recipe trains whole replicas only, as ``key=value``.

    Raises:
        LayoutError: it does not fit the ranks or the model; the message has the number, and the nearest that do. Or it
            splits the model, and there is something in ``whole``.
    """
    replicas = parallel.dp_replicate or max(1, ranks // (parallel.dp_shard * parallel.tp))
    layout = Layout(dp_replicate=replicas, dp_shard=parallel.dp_shard, tp=parallel.tp, ep=parallel.ep)
    check(layout, ranks, sizes)
    if whole and is_split(layout):
        raise LayoutError(
            f"layout {layout}: {whole[0]} is trained in whole replicas only (parallel.dp_replicate); "
            "our own model, all of its weights and train.fp8=off take every layout"
        )
    return layout


def is_split(layout: Layout) -> bool:
    """Whether ranks have parts of the model, not all of it."""
    return layout.fold > 1


def spread(model: Qwen3VL, layout: Layout, world: World, train: TrainConfig) -> Mesh | None:
    """Put a model, which all ranks have, on the ranks, in place; ``world`` takes its samples from then on, so data are
    to be made after this. Collective. A mesh that ``world`` follows already serves again, where it has this layout.

    A model of which ranks have parts keeps float32 weights, and computes with their parts rounded to
    ``train.precision``; a replicated one is left as it is. What requires gradients stays so.

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
    sizes = ModelSizes.of(model.config)
    check(layout, layout.world, sizes)
    mesh = world.mesh
    if mesh is None or mesh.layout != layout:
        with world.watched("the mesh"):
            mesh = Mesh(layout, model=sizes, timeout=timedelta(seconds=train.timeout_seconds))
        world.follow(mesh)
    if is_split(layout):
        half = DataParallel(param_dtype="bfloat16", reduce_dtype="float32")
        data = half if train.precision == "bf16" else DataParallel()
        parallelize(model.float(), mesh, Parallel(data=data))
    return mesh
