"""Two commits in one run: a real commit, exported, installed and measured; and the verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m4ov_bench import against
from m4ov_bench.against import Comparison
from m4ov_kernels.dispatch import native_extension

ROOT = Path(__file__).resolve().parents[2]
needs_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


def verdict(then, now):
    return Comparison("swiglu", "case", "what", then, now).verdict


def test_verdicts():
    assert verdict((2.0, 2.2, 2.1), (1.0, 1.0, 1.0)) == "faster"
    assert verdict((1.0, 1.0, 1.0), (2.0, 2.2, 2.1)) == "slower"
    assert verdict((1.0, 2.0, 2.0), (1.5, 1.0, 1.0)) == "equal"  # the rounds disagree
    assert verdict((1.01, 1.01), (1.0, 1.0)) == "equal"  # too little
    assert verdict((), (1.0,)) == "new"
    assert verdict((1.0,), ()) == "gone"


@needs_checkout
def test_a_revision_that_is_not_there_and_no_rounds():
    with pytest.raises(ValueError, match="no revision 'no-such-branch'"):
        against.compare("no-such-branch", ["activation"], True, 1)
    with pytest.raises(ValueError, match="--rounds must be 1 or more; got 0"):
        against.compare("HEAD", ["activation"], True, 0)


@needs_checkout
def test_this_commit_against_itself_end_to_end(tmp_path):
    """The command: export, install (without kernels, to be quick), and the benchmark of one small case from both."""
    out = tmp_path / "against.json"
    options = ["--quick", "--case", "[1024, 1536]", "--against", "HEAD", "--rounds", "1", "--json", str(out)]
    command = [sys.executable, "-m", "m4ov_bench", "activation", *options]
    environment = os.environ | {"M4OV_BUILD": "0", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["case"] for row in rows} == {"[1024, 1536] bf16"}
    both = {row["what"] for row in rows if len(row["then"]) == len(row["now"]) == 1}
    assert both == {"forward, as called", "forward + backward, as called"}
    only_now = {row["verdict"] for row in rows if row["what"] not in both}
    assert only_now == ({"new"} if native_extension()[0] is not None else set())
    assert "against HEAD" in done.stdout


@needs_checkout
def test_the_other_commit_must_be_what_is_imported(tmp_path):
    """A folder without the packages: the process would import this tree's instead, which is found out."""
    with pytest.raises(RuntimeError, match="not what was built"):
        against._measure(["activation", "--quick"], tmp_path, tmp_path)
