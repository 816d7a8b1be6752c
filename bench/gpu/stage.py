"""One stage as a process: ``python -m m4ov_bench.gpu.stage MODULE --part PATH …``, started by the runner."""

from __future__ import annotations

import argparse
import importlib
import random
import zlib
from pathlib import Path

from m4ov_bench.gpu.part import Part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--operator", default="")
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    part = Part(arguments.part)  # on disk before torch is imported

    import torch

    from m4ov_bench.gpu.context import Context

    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else torch.device("cpu")
    seed = arguments.seed ^ zlib.crc32(f"{arguments.module}:{arguments.operator}".encode())
    random.seed(seed)
    torch.manual_seed(seed)
    work = arguments.part.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    context = Context(part, device, arguments.tiny, arguments.operator, arguments.source, work, seed)
    importlib.import_module(f"m4ov_bench.gpu.{arguments.module}").run(context)
    part.finish()


if __name__ == "__main__":
    main()
