"""A process that computes one reward, an answer at a time; ended from outside where it hangs.

Lines of JSON: it reads what the function is, then one answer after the other; it writes the function's range, then a
value each. Started as ``python -m m4ov.rl.rewards.worker`` by :mod:`m4ov.rl.rewards.pool`; imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from m4ov.rl.rewards.answers import Answer
from m4ov.rl.rewards.registry import RewardError, build

_SPARE = 10.0  # seconds that the trainer has to end this process, before it ends by itself (the trainer may be dead)


def main() -> None:
    """Until there is nothing more to read."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    # What a function reads or prints must not come between.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def reply(**value: Any) -> None:
        replies.write(json.dumps(value).encode() + b"\n")

    wanted = json.loads(requests.readline())
    seconds = wanted.pop("seconds")
    try:
        function = build(**wanted)
    except RewardError as error:
        reply(error=str(error))
        return
    reply(low=function.low, high=function.high, group=function.group)
    for line in requests:
        # The kernel's default for this signal ends the process, even inside a C function that holds the GIL.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + _SPARE)
        try:
            value = float(function.call(Answer.from_line(line)))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"[:500]
            signal.setitimer(signal.ITIMER_REAL, 0)
            reply(error=message)
            continue
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(value=value)


if __name__ == "__main__":
    main()
    sys.exit(0)
