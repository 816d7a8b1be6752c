"""One measured line of a benchmark, and the machine it was measured on."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Machine:
    """Where and when a run was made. ``limits``: bandwidths and rates measured in that run, by name, in base units."""

    cpu: str
    cores: int
    threads: int
    isa: str
    system: str
    versions: dict[str, str]
    allocator: str
    commit: str
    date: str
    seed: int = 0  # of the inputs
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same case: its time, or why there is none.

    ``ratio``: its time over ours, the median over rounds in which both ran; above 1 we are faster. ``error``: the worst
    of its results and gradients over what the numerics rule allows; beyond 1 it has no ratio: a speed is believed only
    of a result as exact as ours must be. ``claim``: the numerics by which it was judged, where they are not ours.
    """

    seconds: float | None = None
    ratio: float | None = None
    memory_mib: float | None = None
    absent: str | None = None
    error: float | None = None
    claim: str = ""


@dataclass(frozen=True)
class Row:
    """What one operator reached in one case.

    ``seconds`` and all that follows from it are ``None`` where the correctness gate is red. ``rate`` is in ``unit``
    per second; ``fraction`` is the limit's time over ours, the median over interleaved rounds, with ``limit`` saying
    what the limit is. ``memory_mib``: the most memory used beyond inputs and outputs. ``faults``: page faults per
    call. ``errors``: per compared tensor, our error over the allowed one (the numerics rule); at most 1 in a green row.
    """

    family: str
    operator: str
    case: str
    what: str
    implementation: str
    machine: Machine
    green: bool
    errors: dict[str, float]
    problem: str = ""
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    bytes: float | None = None
    flops: float | None = None
    limit: str = ""
    limit_seconds: float | None = None
    fraction: float | None = None
    memory_mib: float | None = None
    tokens: int | None = None
    faults: float | None = None
    disturbed: float | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    note: str = ""
