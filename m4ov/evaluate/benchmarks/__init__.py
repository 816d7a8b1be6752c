"""Published benchmarks: their files, their prompts, and the rules by which tools score them."""

from __future__ import annotations

from m4ov.evaluate.benchmarks.base import Benchmark, Question, Reading, Rule
from m4ov.evaluate.benchmarks.mathvision import MATHVISION
from m4ov.evaluate.benchmarks.mathvista import MATHVISTA
from m4ov.evaluate.benchmarks.mmbench import MMBENCH
from m4ov.evaluate.benchmarks.mmstar import MMSTAR
from m4ov.evaluate.benchmarks.tables import find

#: By name, as ``m4ov eval --bench`` has them.
BENCHMARKS = {benchmark.name: benchmark for benchmark in (MMBENCH, MMSTAR, MATHVISTA, MATHVISION)}

__all__ = ["BENCHMARKS", "Benchmark", "Question", "Reading", "Rule", "find"]
