"""The path that everyone reads, from the command to the first logits, stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mlx_openelm import native

import pytest
from processes import environment

COUNTS = Path(__file__).parents[1] / "benchmarks" / "reading.py"


@pytest.mark.skipif(native.kernels is None, reason="counted where the CPU kernels are used")
def test_the_first_logits_are_few_functions_away():
    done = subprocess.run([sys.executable, str(COUNTS)], capture_output=True, text=True, env=environment())
    counts = re.fullmatch(r"(\d+) files, (\d+) functions\n", done.stdout)
    assert counts is not None, done.stderr
    files, functions = map(int, counts.groups())
    assert 10 <= files <= 21 and 50 <= functions <= 110
