"""Which function a name means: one of this package, or any that Python can import."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from m4ov.rl.rewards import functions
from m4ov.rl.rewards.functions import Function

__all__ = ["BUILT_IN", "Function", "RewardError", "build"]

BUILT_IN: dict[str, Callable[..., Function]] = {
    "exact-match": functions.exact_match,
    "option-letter": functions.option_letter,
    "number": functions.number,
    "math": functions.maths,
    "iou": functions.box_iou,
    "format": functions.form,
    "overlong": functions.overlong,
    "cosine": functions.cosine,
    "adaptive-length": functions.adaptive_length,
    "repetition": functions.repetition,
}
SECONDS = 5.0  # of a function that somebody else wrote


class RewardError(ValueError):
    """A reward cannot be made as it is configured; the message names the key."""


def build(name: str, options: Mapping[str, Any], low: float | None = None, high: float | None = None) -> Function:
    """The function of a name, with its options.

    Args:
        name: of :data:`BUILT_IN`; or ``package.module:function``, called with an :class:`Answer` and the options. That
            declares its range by ``low`` and ``high``, or by an attribute ``reward_range = (low, high)``; with an
            attribute ``reward_group = True`` it asks for the group.
        low, high: another range than the function's own.

    Raises:
        RewardError: there is no such function or option, it refuses the options, or its range is not known.
    """
    if ":" in name:
        found = _imported(name, options, low, high)
    elif name in BUILT_IN:
        make = BUILT_IN[name]
        _known("options", options, list(inspect.signature(make).parameters))
        try:
            found = make(**options)
        except (TypeError, ValueError) as error:
            raise RewardError(f"{name}: {str(error).replace(f'{make.__name__}()', 'options')}") from None
    else:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(BUILT_IN)}, and package.module:function"
        raise RewardError(f"function: no reward is named {name!r}; {hint}")
    bounds = found.low if low is None else float(low), found.high if high is None else float(high)
    if not all(map(math.isfinite, bounds)) or bounds[0] > bounds[1]:
        raise RewardError(f"{name}: expected a range of two finite numbers, low and high, got {bounds}")
    return Function(found.call, *bounds, group=found.group, seconds=found.seconds)


def _imported(name: str, options: Mapping[str, Any], low: float | None, high: float | None) -> Function:
    place, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(place)
    except Exception as error:  # whatever a module does when it is imported
        raise RewardError(f"function: {place} cannot be imported ({type(error).__name__}: {error})") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RewardError(f"function: {place} has no {attribute}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise RewardError(f"function: {name} is no function but {type(found).__name__}")
    try:
        inspect.signature(found).bind(None, **options)
    except TypeError as error:
        raise RewardError(f"{name}: options: {error}") from None
    except ValueError:  # a builtin without a signature
        pass
    declared = getattr(found, "reward_range", (None, None))
    bounds = [own if given is None else given for own, given in zip(declared, (low, high), strict=True)]
    if any(bound is None for bound in bounds):
        raise RewardError(f"{name}: expected a declared range: low and high, or {attribute}.reward_range; got {bounds}")
    asks = bool(getattr(found, "reward_group", False))
    return Function(partial(found, **options), float(bounds[0]), float(bounds[1]), group=asks, seconds=SECONDS)


def _known(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"valid here: {', '.join(known) or 'none'}"
            raise RewardError(f"{what}.{name}: no such option; {hint}")
