"""What a checkpoint is: which linears are quantised, which are not and whether its configuration says so, how zero
points are stored, what servers would join, and which kernels take it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from m4ov.checkpoints import kernels
from m4ov.checkpoints.folder import Checkpoint
from m4ov.checkpoints.fused import mismatches
from m4ov.checkpoints.names import PARTS, fused, is_row_parallel, part_of
from m4ov.checkpoints.seen import Seen, look
from m4ov.models.sharded import WeightsError, some
from m4ov_kernels.gemm import weights as formats
from m4ov_kernels.gemm.weights.formats import awq, block_fp8, compressed_tensors_int4, gptq, modelopt_w4a16_awq

LEVELS = ("error", "warning", "note")
#: How a format stores zero points, and what its scales do.
CONVENTIONS = {
    awq.NAME: "z as it is (0..15) in qzeros, nibbles along the outputs in the order 0, 2, 4, 6, 1, 3, 5, 7",
    gptq.V1: "z − 1 in qzeros (version 1): 7 is a zero point of 8, and z = 0 has no meaning that readers share",
    gptq.V2: "z as it is in qzeros (version 2); a reader of version 1 would take every zero point for one more",
    compressed_tensors_int4.NAME: "codes stored as q + 8; zero points, where there are any, packed along the outputs",
    modelopt_w4a16_awq.NAME: "no zero points: two's complement, two output rows a byte; pre_quant_scale on the input",
    block_fp8.NAME: "no zero points; weight_scale_inv multiplies in spite of its name",
}
_NO_ZEROS = "no zero points; weight_scale multiplies"


@dataclass(frozen=True)
class Finding:
    """``level`` of ``LEVELS``: an error means that no server computes with these weights as they are meant."""

    level: str
    message: str


@dataclass(frozen=True)
class Product:
    """What a server multiplies with: a module, or several joined; ``shape`` on one rank; see ``kernels.eligible``."""

    name: str
    part: str
    modules: tuple[str, ...]
    scheme: str
    shape: tuple[int, int]
    kernels: dict[str, str | None]


@dataclass(frozen=True)
class Report:
    """Attributes:
    formats: format → how many modules have it.
    conventions: format → how it stores zero points.
    linears: part → {"quantised", "left", "quantised_bytes", "left_bytes"}; a head that is the embeddings is in none.
    seen: every quantised weight that was read.
    left: linears that are not quantised, [N, K].
    products, findings: see there.
    """

    folder: str
    said_by: str
    tensors: int
    nbytes: int
    formats: dict[str, int]
    conventions: dict[str, str]
    linears: dict[str, dict[str, int]]
    seen: dict[str, Seen]
    left: dict[str, tuple[int, ...]]
    ranks: int
    products: list[Product]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)


def inspect(checkpoint: Checkpoint, *, ranks: int = 1, advance: Callable[[int], object] = lambda done: None) -> Report:
    """Read every quantised weight, one at a time, and say what was found; a weight that cannot be read is a finding.

    Args:
        ranks: of tensor parallelism, for the kernels.
        advance: called with the bytes that were read.
    """
    seen: dict[str, Seen] = {}
    findings = [Finding("note", note) for note in checkpoint.notes]
    for name, tensors in checkpoint.modules.items():
        try:
            seen[name] = look(checkpoint.read(name), checkpoint.format_of(name))
        except WeightsError as error:
            findings.append(Finding("error", f"{part_of(name)}: {error}{_other_version(checkpoint, name)}"))
        advance(sum(tensor.nbytes for tensor in tensors.values()))
    found = Counter(one.format for one in seen.values())
    findings += _coverage(checkpoint)
    findings += [
        Finding("error" if one.breaks else "warning", f"{one.product}: {one.reason}")
        for one in mismatches(seen, set(checkpoint.linears))
    ]
    findings += _serving(checkpoint, seen)
    linears = {part: {"quantised": 0, "left": 0, "quantised_bytes": 0, "left_bytes": 0} for part in PARTS}
    for name, tensors in checkpoint.modules.items():
        linears[part_of(name)]["quantised"] += 1
        linears[part_of(name)]["quantised_bytes"] += sum(tensor.nbytes for tensor in tensors.values())
    for name in checkpoint.linears:
        linears[part_of(name)]["left"] += 1
        linears[part_of(name)]["left_bytes"] += checkpoint.tensors[f"{name}.weight"].nbytes
    order = {level: place for place, level in enumerate(LEVELS)}
    return Report(
        str(checkpoint.folder),
        checkpoint.said_by,
        len(checkpoint.tensors),
        sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        dict(found),
        {name: CONVENTIONS.get(name, _NO_ZEROS) for name in found},
        linears,
        seen,
        checkpoint.linears,
        ranks,
        _products(checkpoint, seen, ranks),
        sorted(findings, key=lambda finding: order[finding.level]),
    )


def _other_version(checkpoint: Checkpoint, module: str) -> str:
    """GPTQ's two versions differ in one bit of configuration, which tools forget; zero points of 8 throughout tell."""
    config = checkpoint.quantization
    if config.get("quant_method") != "gptq" or config.get("sym") is not True:
        return ""
    version = gptq.V1 if config.get("checkpoint_format") == gptq.V2 else gptq.V2
    try:
        tensors = {key: tensor.read() for key, tensor in checkpoint.modules[module].items()}
        formats.read(tensors, {**config, "checkpoint_format": version}, module)
    except (TypeError, ValueError):
        return ""
    return f" — as checkpoint_format {version!r} it is a symmetric weight: the configuration names the wrong version"


def _coverage(checkpoint: Checkpoint) -> Iterable[Finding]:
    """Files against the configuration's list of what is left out; and the head."""
    quantised, left = checkpoint.modules, checkpoint.linears
    if quantised and not checkpoint.quantization:
        return  # each of them is an error already
    if not quantised:
        if checkpoint.quantization:
            yield Finding("error", f"{checkpoint.said_by} says that weights are quantised, and no tensor is")
        return
    try:
        rules = formats.exclusions(checkpoint.quantization)
    except (TypeError, ValueError) as error:
        yield Finding("error", str(error))
        return
    for part in PARTS:
        silent = [n for n in left if part_of(n) == part and not any(excludes(n) for excludes in rules.values())]
        if silent and checkpoint.quantization.get("quant_method") == "gptq":
            told = f"{part}: {len(silent)} linears in 16 bits ({some(silent)})"
            yield Finding("note", f"{told}; GPTQ's configuration has no list of such")
        elif silent:
            level = "warning" if part == "lm_head" else "error"
            yield Finding(
                level,
                f"{part}: {len(silent)} linears are in 16 bits ({some(silent)}), and {checkpoint.said_by} does not "
                "leave them out: a server looks for scales that are not there",
            )
        whole = [name for name in quantised if part_of(name) == part]
        if whole and part in ("vision", "merger"):
            yield Finding("note", f"{part}: {len(whole)} linears are quantised")
    names = {"lm_head", *checkpoint.tensors, *(name.rpartition(".")[0] for name in checkpoint.tensors)}
    for entry, excludes in rules.items():
        if not any(map(excludes, names)):
            yield Finding("warning", f"{checkpoint.said_by} leaves out {entry!r}, which names nothing in the files")
    yield from _head(checkpoint)


def _head(checkpoint: Checkpoint) -> Iterable[Finding]:
    there = "lm_head" in checkpoint.modules
    if checkpoint.tied and there:
        yield Finding("error", "lm_head is quantised and config.json ties it to the embeddings: servers drop it")
    if there:
        return
    embeddings = next((t for name, t in checkpoint.plain.items() if name.endswith("embed_tokens.weight")), None)
    tensor = checkpoint.tensors.get("lm_head.weight", embeddings if checkpoint.tied else None)
    if tensor is None:
        return
    text = sum(t.nbytes for name, ts in checkpoint.modules.items() if part_of(name) == "text" for t in ts.values())
    text += sum(checkpoint.tensors[f"{n}.weight"].nbytes for n in checkpoint.linears if part_of(n) == "text")
    share = tensor.nbytes / (tensor.nbytes + text)
    how = "is the embeddings and stays" if checkpoint.tied else "stays"
    yield Finding("note", f"lm_head {how} in 16 bits: {share:.0%} of the weight bytes of a decoded token")


def _serving(checkpoint: Checkpoint, seen: dict[str, Seen]) -> Iterable[Finding]:
    """What vLLM does with formats, apart from kernels."""
    scaled = [name for name, one in seen.items() if one.pre_quant_scale is not None]
    kinds = {one.format for one in seen.values()}
    if modelopt_w4a16_awq.NAME in kinds:
        yield Finding(
            "warning",
            f"{modelopt_w4a16_awq.ALGORITHM}: vLLM does not load it, and {len(scaled)} weights have a pre_quant_scale; "
            "`convert` folds these into what makes the input, and writes a format that it loads",
        )
    vision = [name for name in seen if "visual" in name]
    if vision and any(kind.startswith("modelopt") for kind in kinds):
        yield Finding("error", f"vision: {len(vision)} linears quantised; vLLM takes ModelOpt's `visual` as 16 bits")
    if kinds & {gptq.V1, gptq.V2}:
        asymmetric = [name for name, one in seen.items() if not one.fields["symmetric"]]
        if asymmetric:
            message = f"{len(asymmetric)} weights with zero points: vLLM loads symmetric GPTQ; awq holds the same bits"
            yield Finding("warning", message)
    even = [one for one in seen.values() if one.zeros == (8, 8)]
    if even and len(even) == len(seen):
        yield Finding("note", "every zero point is 8: it is symmetric, and other formats can say so")
    wide = [name for name, one in seen.items() if one.fields["kind"] == "int4" and one.scale_dtype == "float32"]
    if wide:
        yield Finding("note", f"{len(wide)} int4 weights have float32 scales, which servers round to the model's dtype")
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        inner = checkpoint.quantization.get("quantization")
        value = checkpoint.quantization.get(key) or (inner.get(key) if isinstance(inner, dict) else None)
        if value:
            yield Finding("note", f"the KV cache is quantised too ({key}: {value})")


def _products(checkpoint: Checkpoint, seen: dict[str, Seen], ranks: int) -> list[Product]:
    joined = {name: (product, names) for product, names in fused(seen).items() for name in names}
    made: dict[str, Product] = {}
    for name, one in seen.items():
        product, names = joined.get(name, (name, (name,)))
        if product in made:
            continue
        parts = [seen[part] for part in names]
        split = is_row_parallel(product)
        N, K = sum(part.shape[0] for part in parts), one.shape[1]
        shape = (N, K // ranks) if split else (N // ranks, K)
        fields: dict[str, Any] = one.fields | {
            "symmetric": all(part.fields.get("symmetric", True) for part in parts),
            "activations": kernels.activations_of(one.format, checkpoint.quantization),
        }
        verdict: dict[str, str | None]
        if (K if split else N) % ranks:
            what = f"{'K' if split else 'N'} = {K if split else N} over {ranks} ranks does not come out even"
            verdict = dict.fromkeys(kernels.eligible(kernels.Product(*shape, **fields)), what)
        else:
            verdict = kernels.eligible(kernels.Product(*shape, **fields, ranks=ranks, splits_inputs=split))
        made[product] = Product(product, part_of(product), names, one.scheme, shape, verdict)
    return list(made.values())
