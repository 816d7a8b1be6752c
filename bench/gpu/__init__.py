"""The GPU suite: one command that builds, checks and measures everything on a CUDA machine, and keeps what it has.

``make gpu`` installs into a folder of its own (:mod:`m4ov_bench.gpu.install`) and runs ``python -m m4ov_bench.gpu``:
stages, each a process with a time limit that writes its part of the results after every check and every measurement
(:mod:`m4ov_bench.gpu.part`), and one JSON file and one table, written anew whenever a stage ends. ``make gpu-dry`` runs
the same stages on the CPU with Triton's interpreter and tiny shapes; the few lines that only a chip can run stand in
:mod:`m4ov_bench.gpu.device`, and a dry run reports them as not run.

The runner and what it needs import the standard library alone; PyTorch is imported by the stages.
"""
