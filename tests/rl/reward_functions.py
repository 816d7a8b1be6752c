"""Rewards that somebody else wrote, as entry points: some do what they should, others whatever can go wrong."""

from __future__ import annotations

import os
import re
import time


def length_share(answer, *, most=10):
    return min(len(answer.text) / most, 1.0)


length_share.reward_range = (0.0, 1.0)


def troubled(answer):
    """Does what the text says."""
    match answer.text:
        case "raise":
            raise KeyError("no such thing")
        case "loop":
            while True:
                pass
        case "sleep":
            time.sleep(600)
        case "regex":  # in C, with the GIL
            re.fullmatch(r"(a+)+b", "a" * 64)
        case "exit":
            os._exit(3)
        case "abort":
            os.abort()
        case "child":
            child = os.fork()
            if not child:
                time.sleep(600)
            raise RuntimeError(f"child {child}")
        case "nan":
            return float("nan")
        case "infinite":
            return float("inf")
        case "text":
            return "much"
        case "print":
            print('{"value": 17}', flush=True)
    return 0.5


troubled.reward_range = (-1.0, 1.0)


def of_group(answer):
    return answer.solve_rate * answer.group_size


of_group.reward_range = (0.0, 100.0)
of_group.reward_group = True


def undeclared(answer):
    return 1.0


NOT_A_FUNCTION = 3
