"""The vision operators through the compiled kernels (CPU). One file for each group of operators; this one hands
their raw functions on, under the names that :meth:`m4ov_kernels.dispatch.Operator.load` asks for."""

from __future__ import annotations

__all__: list[str] = []
