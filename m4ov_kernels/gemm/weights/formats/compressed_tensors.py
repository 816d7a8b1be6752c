"""The config of compressed-tensors: which scheme a module has, and the fragment that a writer hands back.

``config_groups.*`` = {targets, weights, input_activations, output_activations, format}; a target is a module's name, a
class of modules ("Linear"), or ``re:`` and a pattern that matches from the name's start. A name goes before a pattern,
and both before a class. ``ignore`` has the same kinds of entries.
"""

from __future__ import annotations

from typing import Any

from m4ov_kernels.checks import refuse
from m4ov_kernels.gemm.weights.formats.fields import Config, Settings, matches

METHOD = "compressed-tensors"
_ABSENT = (None, False)


def _matches(target: str, prefix: str) -> int:
    """3 a name, 2 a pattern, 1 a class (which a checkpoint's names do not tell: it may be this module's), 0 none."""
    if target == prefix:
        return 3
    if target.startswith("re:"):
        return 2 if matches(METHOD, target.removeprefix("re:"), prefix) else 0
    return 1 if "." not in target and target[:1].isupper() else 0


def exclusions(config: Config) -> list[str]:
    """What the config leaves unquantised."""
    return Settings(METHOD, config).names("ignore")


def excludes(entry: str, prefix: str) -> bool:
    return _matches(entry, prefix) > 1


def scheme_of(config: Config, prefix: str) -> Settings:
    """The config group of a module whose tensors are quantised."""
    settings = Settings(METHOD, config)
    ignored = [entry for entry in exclusions(config) if excludes(entry, prefix)]
    if ignored:
        settings.refuse("ignore", f"without {prefix!r}, whose tensors are quantised", ignored[0])
    best: list[tuple[str, Settings]] = []
    highest = 1
    groups = settings.part("config_groups")
    for name in groups.values:
        group = groups.part(name)
        strength = max((_matches(target, prefix) for target in group.names("targets")), default=0)
        if strength > highest:
            best, highest = [], strength
        if strength == highest:
            best.append((name, group))
    if len(best) != 1:
        expected = f"one group that is {prefix!r}'s"
        settings.refuse("config_groups", expected, [name for name, _ in best] or sorted(map(str, groups.values)))
    return best[0][1]


def format_of(config: Config, prefix: str) -> str:
    """How the module is stored: its group's ``format``, or the whole config's."""
    scheme = scheme_of(config, prefix)
    value = scheme.values.get("format") or config.get("format")
    if not isinstance(value, str):
        refuse(ValueError, METHOD, f"{scheme.where}['format']", "the name of a format", repr(value))
    return value


def weights_of(config: Config, prefix: str, name: str, *, bits: int, kind: str) -> Settings:
    """The arguments of the weights, of which the plain ones are checked here."""
    settings = scheme_of(config, prefix)
    weights = Settings(name, settings.values.get("weights"), f"{settings.where}['weights']")
    weights.get("num_bits", (bits,))
    weights.get("type", (kind,))
    weights.get("dynamic", _ABSENT)
    return weights


def fragment(format: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    """A whole ``quantization_config`` of one group, whose targets and ignore list are the caller's to fill in."""
    return {
        "quant_method": METHOD,
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
                "output_activations": None,
                "format": format,
            }
        },
        "ignore": [],
        "kv_cache_scheme": None,
    }
