"""``python -m m4ov_bench``; ``m4ov bench`` also sets the allocator up."""

from __future__ import annotations

import argparse
import sys

from m4ov_bench.command import add_arguments, execute

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m m4ov_bench", description=__doc__)
    add_arguments(parser)
    sys.exit(execute(parser.parse_args()))
