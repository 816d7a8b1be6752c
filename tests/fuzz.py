"""Random valid and invalid calls of every operator, under AddressSanitizer and UBSan, on every instruction set.

``make fuzz`` or ``python tests/fuzz.py [--calls 1000000] [--seed N] [--workers 2] [--plain]``: builds the sanitized
extension (``--plain``: uses the installed one) and makes the calls in worker processes. A call that fails is printed
as ``SEED:INDEX``, and ``python tests/fuzz.py --only SEED:INDEX`` makes that one alone. What is drawn and what is
checked: ``tests/kernels/fuzzing.py`` and ``tests/kernels/operators``.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
REPORT_SECONDS = 2.0
MAX_FAILURES = 10  # of one worker


def work(seed: int, first: int, step: int, last: int, sanitized: bool, position: Path) -> None:
    """Make the calls ``first, first + step, …`` below ``last``; reports in lines of JSON on standard output. The index
    of the call in progress stands in the file ``position``, for a call that takes the process with it."""
    sys.path.append(str(ROOT))  # behind the sanitized build
    from tests import sanitize
    from tests.kernels.fuzzing import FuzzError, fuzz

    if sanitized:
        from m4ov_kernels import _C

        assert _C.__file__.startswith(str(sanitize.TARGET)), _C.__file__
    counts: Counter[str] = Counter()
    failures, told = 0, time.monotonic()
    with position.open("wb", buffering=0) as mark:
        for index in range(first, last, step):
            os.pwrite(mark.fileno(), b"%020d" % index, 0)
            try:
                outcome = fuzz(seed, index)
            except FuzzError as error:
                failures += 1
                say(failure=f"{seed}:{index}", message=str(error))
                if failures == MAX_FAILURES:
                    break
                continue
            for key in (outcome.operator, outcome.dtype, outcome.isa, outcome.kind):
                counts[key] += 1
            counts["/".join(outcome[:4])] += 1
            counts["judged"] += outcome.judged
            counts["guarded"] += outcome.guarded
            counts["calls"] += 1
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                say(counts=counts)
    say(counts=counts, done=True)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def start(arguments: argparse.Namespace, seed: int, worker: int, folder: Path) -> tuple[subprocess.Popen[str], TextIO]:
    sys.path.insert(0, str(ROOT))
    from tests import sanitize

    environment = dict(os.environ) if arguments.plain else sanitize.environment()
    # For speed: what is freed is watched for a while only, and has short histories (--only gives the long ones).
    environment["ASAN_OPTIONS"] = f"{environment.get('ASAN_OPTIONS', '')}:quarantine_size_mb=16:malloc_context_size=2"
    environment["OMP_WAIT_POLICY"] = "passive"  # the workers share the cores
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    command = [sys.executable, __file__, "--worker", f"{seed}:{worker}:{arguments.workers}:{arguments.calls}"]
    command += [str(folder / f"{worker}.position"), *(["--plain"] if arguments.plain else [])]
    errors = (folder / f"{worker}.err").open("w+")
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
    return process, errors


def run(arguments: argparse.Namespace) -> int:
    import selectors

    seed = arguments.seed if arguments.seed is not None else secrets.randbits(32)
    print(f"{arguments.calls} calls, seed {seed}, {arguments.workers} workers", flush=True)
    started, failed = time.monotonic(), 0
    totals: dict[int, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name, selectors.DefaultSelector() as selector:
        folder = Path(name)
        workers = [start(arguments, seed, i, folder) for i in range(arguments.workers)]
        for i, (process, _) in enumerate(workers):
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, i)
        while selector.get_map():
            for key, _ in selector.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    selector.unregister(key.fileobj)
                    continue
                told = json.loads(line)
                if "failure" in told:
                    failed += 1
                    print(f"\nFAILED {told['failure']}: {told['message']}", flush=True)
                else:
                    totals[key.data] = Counter(told["counts"])
                    progress(totals, arguments.calls, time.monotonic() - started, end="\r")
        for i, (process, errors) in enumerate(workers):
            if process.wait() != 0:
                failed += 1
                errors.seek(0)
                mark = folder / f"{i}.position"
                at = f"{seed}:{int(mark.read_text() or 0)}" if mark.exists() else "the start"
                print(f"\nCRASHED at {at} with status {process.returncode}:\n{errors.read()[-6000:]}", flush=True)
    total = sum(totals.values(), Counter())
    progress({0: total}, arguments.calls, time.monotonic() - started, end="\n")
    summary(total)
    print(f"failed: {failed}" if failed else "no call failed")
    return 1 if failed else 0


def progress(totals: dict[int, Counter[str]], calls: int, seconds: float, end: str) -> None:
    made = sum(counts["calls"] for counts in totals.values())
    print(f"{made} of {calls} calls, {seconds:.0f} s, {made / max(seconds, 1e-9):.0f} calls/s", end=end, flush=True)


def summary(total: Counter[str]) -> None:
    """Calls by operator and dtype on each instruction set, and how they were checked."""
    cells = {tuple(key.split("/")): count for key, count in total.items() if "/" in key}
    isas = sorted({isa for _, _, isa, _ in cells})
    print(
        "".join(f"{head:>{width}}" for head, width in (("operator", 22), ("dtype", 11), *((isa, 13) for isa in isas)))
    )
    for operator, dtype in sorted({(operator, dtype) for operator, dtype, _, _ in cells}):
        counts = [sum(n for key, n in cells.items() if key[:3] == (operator, dtype, isa)) for isa in isas]
        print(f"{operator:>22}{dtype:>11}" + "".join(f"{count:>13}" for count in counts))
    forward, backward = total["forward"], total["backward"]
    print(f"forward alone {forward}, with backward {backward}, wrong arguments refused {total['refused']}")
    print(f"compared with float64 {total['judged']}, run again into guarded outputs {total['guarded']}")


def only(name: str, plain: bool) -> int:
    """One call, in a worker of its own if it runs sanitized."""
    seed, index = map(int, name.split(":"))
    if not plain:
        sys.path.insert(0, str(ROOT))
        from tests import sanitize

        sanitize.build()
        command = [sys.executable, __file__, "--only", name, "--plain"]
        return subprocess.run(command, env=sanitize.environment()).returncode
    sys.path.append(str(ROOT))
    from tests.kernels.fuzzing import fuzz

    print(fuzz(seed, index))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, help="default: a fresh one, printed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="without the sanitizers")
    parser.add_argument("--only", metavar="SEED:INDEX", help="make this one call")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        seed, worker, step, last = map(int, arguments.worker[0].split(":"))
        work(seed, worker, step, last, not arguments.plain, Path(arguments.worker[1]))
        return 0
    if arguments.only:
        return only(arguments.only, arguments.plain)
    if not arguments.plain:
        sys.path.insert(0, str(ROOT))
        from tests import sanitize

        sanitize.build()
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
