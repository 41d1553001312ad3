"""benchmarks/serving.py: both servers run, and every row is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

pytest.importorskip("mlx_lm")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_row_is_printed() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--size", "tiny", "--quick", "--json"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"].removeprefix("tiny, 8 clients: ") for row in rows] == [
        *("tokens/s", "time to first token, p50", "time to first token, p95", "between tokens, p50"),
        "between tokens, p95",
    ]
    assert all(row["ours"] > 0 and row["other"] > 0 for row in rows)
    assert [row["bar"] for row in rows] == [2.0, 0.6, 0.6, None, None]
