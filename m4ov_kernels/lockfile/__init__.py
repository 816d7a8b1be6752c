"""The kernel lockfile: every GPU kernel of every family, compiled for every target without a GPU, read, held to budgets
and compared with what was committed. ``m4ov kernels lock|check|show`` is its command (``command.py``).

What is locked stands beside this file, a file per compiler: ``triton-<version>.json`` and ``nvcc-<version>.json``.
"""

from m4ov_kernels.lockfile.read import Code, read_amdgcn, read_cubin
from m4ov_kernels.lockfile.report import Report

__all__ = ["Code", "Report", "read_amdgcn", "read_cubin"]
