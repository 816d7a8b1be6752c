"""Random valid and invalid calls of every operator, under AddressSanitizer and UBSan, on every instruction set.

``make fuzz`` or ``python tests/fuzz.py [--calls 1000000] [--seed N] [--workers 2] [--plain]``: builds the sanitized
extension (``--plain``: uses the installed one) and makes the calls in worker processes. A call that fails is printed
as ``SEED:INDEX`` when it fails, and ``python tests/fuzz.py --only SEED:INDEX`` makes that one alone. A call that takes
its process with it, or does not come back, is such a failure: another process goes on behind it. A run that was
stopped says with which arguments it goes on. What is drawn and what is checked: ``tests/kernels/fuzzing.py`` and
``tests/kernels/operators``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
REPORT_SECONDS = 2.0
HANG_SECONDS = 900.0  # a call takes milliseconds; while others measure, workers are halted for minutes
# PyTorch keeps about 100 KiB of code for every new shape of a bf16 product, without an end: half a million calls need
# gigabytes. A process that has grown this large makes way for another.
MOST_MEMORY = 1.5 * 2**30
MAX_FAILURES = 50  # of all workers; each crash costs the seconds in which a process starts


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
    told = -REPORT_SECONDS
    with position.open("wb", buffering=0) as mark:
        for index in range(first, last, step):
            os.pwrite(mark.fileno(), b"%020d" % index, 0)
            if time.monotonic() - told > REPORT_SECONDS:
                told = time.monotonic()
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
                if say_memory(counts=counts, next=index) > MOST_MEMORY:
                    return
            counts["calls"] += 1
            try:
                outcome = fuzz(seed, index)
            except FuzzError as error:
                say(failure=f"{seed}:{index}", message=str(error))
                continue
            for key in (outcome.operator, outcome.dtype, outcome.isa, outcome.kind):
                counts[key] += 1
            counts["/".join(outcome[:4])] += 1
            counts["judged"] += outcome.judged
            counts["guarded"] += outcome.guarded
    say_memory(counts=counts, next=last)


def say_memory(**fields: Any) -> int:
    """Says it with the bytes that this process holds, and returns these."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    say(**fields, memory=pages * resource.getpagesize())
    return pages * resource.getpagesize()


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Worker:
    """One process after another, for every ``workers``-th call."""

    def __init__(self, arguments: argparse.Namespace, number: int, folder: Path) -> None:
        self.arguments, self.folder, self.number = arguments, folder, number
        self.next = arguments.first + number
        self.position, self.errors = folder / f"{number}.position", folder / f"{number}.err"
        self.before: Counter[str] = Counter()  # of the processes that crashed
        self.counts: Counter[str] = Counter()
        self.memory = 0
        self.start()

    def start(self) -> None:
        from tests import sanitize

        arguments = self.arguments
        environment = dict(os.environ) if arguments.plain else sanitize.environment()
        # For speed: what is freed is watched for a while only, and has short histories (--only gives the long ones).
        options = f"{environment.get('ASAN_OPTIONS', '')}:quarantine_size_mb=16:malloc_context_size=2"
        environment |= {"ASAN_OPTIONS": options, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        environment["OMP_WAIT_POLICY"] = "passive"  # the workers share the cores
        self.position.unlink(missing_ok=True)
        calls = f"{arguments.seed}:{self.next}:{arguments.workers}:{arguments.calls}"
        command = [sys.executable, __file__, "--worker", calls, str(self.position)]
        command += ["--plain"] if arguments.plain else []
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def at(self) -> int | None:
        """The index of the call in progress; ``None``: there was none yet."""
        text = self.position.read_text() if self.position.exists() else ""
        return int(text) if text else None

    def made(self) -> Counter[str]:
        return self.before + self.counts

    def ended(self) -> str | None:
        """How the process crashed; ``None``: it came to its end. :attr:`next` is behind its last call then."""
        status, index = self.process.wait(), self.at()
        self.before, self.counts = self.made(), Counter()
        if status == 0:
            return None
        where = "the start" if index is None else f"{self.arguments.seed}:{index}"
        if index is not None:
            self.next = index + self.arguments.workers
        return f"CRASHED at {where} with status {status}:\n{self.errors.read_text(errors='replace')[-6000:]}"


def run(arguments: argparse.Namespace) -> int:
    if arguments.seed is None:
        arguments.seed = secrets.randbits(32)
    wanted = max(0, arguments.calls - arguments.first)
    print(f"{wanted} calls, seed {arguments.seed}, {arguments.workers} workers", flush=True)
    signal.signal(signal.SIGTERM, _stop)
    started, failed, shown, stopped = time.monotonic(), 0, 0.0, False
    with tempfile.TemporaryDirectory() as name, selectors.DefaultSelector() as selector:
        workers = [Worker(arguments, i, Path(name)) for i in range(arguments.workers)]

        def failure(message: str) -> None:
            nonlocal failed
            failed += 1
            print(f"\n{message}", flush=True)

        def watch(worker: Worker) -> None:
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

        try:
            for worker in workers:
                watch(worker)
            while selector.get_map() and failed < MAX_FAILURES:
                for key, _ in selector.select():
                    worker, line = key.data, key.fileobj.readline()  # type: ignore[union-attr]
                    told = {}
                    with contextlib.suppress(json.JSONDecodeError):  # a crash may cut a line
                        told = json.loads(line)
                    if "failure" in told:
                        failure(f"FAILED {told['failure']}: {told['message']}")
                    elif "counts" in told:
                        worker.counts, worker.memory = Counter(told["counts"]), told["memory"]
                        worker.next = told["next"]
                        if sys.stdout.isatty() or time.monotonic() - shown > 60:
                            shown = time.monotonic()
                            progress(workers, wanted, shown - started, end="\r" if sys.stdout.isatty() else "\n")
                    if not line:
                        selector.unregister(key.fileobj)
                        crash = worker.ended()
                        if crash is not None:
                            failure(crash)
                            if "at the start" in crash:  # and would again
                                continue
                        if worker.next < arguments.calls and failed < MAX_FAILURES:
                            worker.start()
                            watch(worker)
        except KeyboardInterrupt:
            stopped = True
        if stopped or failed >= MAX_FAILURES:
            resume = min((worker.at() if worker.at() is not None else worker.next) for worker in workers)
            print(f"\nstopped; --seed {arguments.seed} --first {resume} --calls {arguments.calls} goes on")
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    progress(workers, wanted, time.monotonic() - started, end="\n")
    total = sum((worker.made() for worker in workers), Counter())
    summary(total)
    print(f"failed: {failed}" if failed else "no call failed")
    return 1 if failed or total["calls"] < wanted else 0


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def progress(workers: list[Worker], calls: int, seconds: float, end: str) -> None:
    made, memory = sum(worker.made()["calls"] for worker in workers), max(worker.memory for worker in workers)
    rate = f"{made / max(seconds, 1e-9):.0f} calls/s, at most {memory >> 20} MiB a process"
    print(f"{made} of {calls} calls, {seconds:.0f} s, {rate}", end=end, flush=True)


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
    parser.add_argument("--first", type=int, default=0, help="the index to begin with, of a run that was stopped")
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
    sys.path.insert(0, str(ROOT))
    if not arguments.plain:
        from tests import sanitize

        sanitize.build()
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
