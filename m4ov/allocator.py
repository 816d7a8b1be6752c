"""Keeps the memory of large CPU tensors in the process, so that it is not page-faulted afresh at every use.

glibc maps every block above a threshold (at most 32 MiB by itself) with ``mmap`` and gives it back when it is freed. A
tensor of 32 MiB is then 8,192 page faults, which cost more than a fast kernel does: a training step of a language model
with 32,000 words took a third longer. Huge pages on top of that (glibc 2.35) took another 4% off the step and some 10%
off kernels that are bound by memory, for no more memory.

The thresholds must be set before the memory is first used, and glibc reads the environment before ``main``; so a
command of m4ov starts itself again with the variables set (:func:`ensure`). A program that cannot do this sets them
itself, or calls :func:`tune_in_process` before it imports torch. The price: a freed block serves the next tensors, not
other processes, until the process ends.

Only the standard library is imported here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

_BYTES = "4294967296"  # 4 GiB: larger blocks are rare, and still mapped
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": _BYTES, "MALLOC_TRIM_THRESHOLD_": _BYTES}
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
SWITCH = "M4OV_ALLOCATOR"  # "0": leave the allocator alone
_RESTARTED = "_M4OV_ALLOCATOR_RESTARTED"  # the pid that has been started again; exec keeps the pid
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_PROBE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Status:
    """What a large allocation does in this process. ``keeps``: observed, ``None`` where it cannot be observed."""

    keeps: bool | None
    how: str  # "environment", "in process", "not set up"
    reason: str


_tuned_in_process = False


def unavailable() -> str | None:
    """Why the thresholds would do nothing in this process; ``None`` on glibc Linux with glibc's own allocator."""
    if sys.platform != "linux":
        return f"the thresholds are glibc's; this is {platform.system() or sys.platform}"
    if not _glibc_version():
        return "the thresholds are glibc's; this C library is another (musl?)"
    for name in _OTHER_ALLOCATORS:
        if name in os.environ.get("LD_PRELOAD", "") or name in _mapped_files():
            return f"{name} is preloaded and replaces glibc's allocator"
    return None


def ensure() -> None:
    """Start this command again with the allocator set up, if that is needed and possible; else return at once.

    Called first thing in a command, before torch is imported. Never loops: the second start finds the variables, and
    a mark in the environment for the case that something strips them.
    """
    if _refusal_to_restart() is not None:
        return
    environment = {**os.environ, **ENVIRONMENT, **_huge_pages(), _RESTARTED: str(os.getpid())}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _refusal_to_restart() -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    reason = unavailable()
    if reason is not None:
        return reason
    if all(os.environ.get(name) for name in ENVIRONMENT):
        return "the environment sets it up"
    if os.environ.get(_RESTARTED) == str(os.getpid()):
        return "the variables were lost on the way to the restarted process"
    if "torch" in sys.modules:
        return "torch is already imported"
    if not sys.executable or len(sys.orig_argv) < 2:
        return "this process does not run a command that could be started again"
    return None


def _huge_pages() -> dict[str, str]:
    """The variable that asks for transparent huge pages in the heap, added to what the user has tuned."""
    tuned = os.environ.get(_TUNABLES, "")
    if _HUGE_PAGES in tuned or _glibc_version() < (2, 35):
        return {}
    return {_TUNABLES: ":".join(filter(None, (tuned, f"{_HUGE_PAGES}=1")))}


def tune_in_process() -> Status:
    """For library users: set glibc's allocator up from inside the process, best before torch is imported.

    Maps no block at all (``M_MMAP_MAX=0``) and keeps 2 GiB free at the top of the heap, because ``mallopt`` takes an
    ``int`` where the environment takes 64 bits. Gets most, not all, of what the environment gives.
    """
    global _tuned_in_process
    if os.environ.get(SWITCH) != "0" and unavailable() is None:
        libc = ctypes.CDLL(None)
        ok = libc.mallopt(_M_MMAP_MAX, 0) == 1 and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
        _tuned_in_process = _tuned_in_process or ok
    return status()


def status() -> Status:
    """Whether large blocks stay in the process, seen from one that is allocated (not touched) and freed."""
    reason = unavailable()
    if reason is not None:
        return Status(None, "not set up", reason)
    keeps = _observe()
    if _tuned_in_process:
        return Status(keeps, "in process", "mallopt: no block is mapped, 2 GiB may stay free on top of the heap")
    if all(os.environ.get(name) for name in ENVIRONMENT):
        values = ", ".join(f"{name}={os.environ[name]}" for name in (*ENVIRONMENT, _TUNABLES) if name in os.environ)
        return Status(keeps, "environment", values)
    refusal = _refusal_to_restart()
    return Status(keeps, "not set up", refusal or "only a command of m4ov starts itself again")


def _glibc_version() -> tuple[int, ...]:
    """``(2, 36)``; empty for another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()
    except (ValueError, OSError, AttributeError):
        return ()


def _mapped_files() -> str:
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return "\n".join({line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")})
    except OSError:
        return ""


class _Mallinfo2(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _observe() -> bool | None:
    """Whether glibc takes a block of 256 MiB from the heap (``True``) or maps it (``False``)."""
    libc = ctypes.CDLL(None)
    try:
        mallinfo2 = libc.mallinfo2  # glibc 2.33
    except AttributeError:
        return None
    mallinfo2.restype = _Mallinfo2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = mallinfo2().hblkhd
    block = libc.malloc(_PROBE_BYTES)
    if not block:
        return None
    mapped = mallinfo2().hblkhd - before
    libc.free(block)
    return bool(mapped < _PROBE_BYTES)
