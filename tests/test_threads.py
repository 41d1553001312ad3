"""Training in a thread, and the package in a forked process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from processes import environment

TRAIN = """
import sys, threading
import mlx.core as mx, mlx.nn as nn
from mlx_openelm import FineTuneOptions, finetune

options = FineTuneOptions(train=True, data=sys.argv[1], iters=1, batch_size=4, adapter_path=sys.argv[2])

def train():
    finetune("tiny", options, progress=False)
    for dimensions in range(1, 60):  # compiled functions that take the thread some time to free
        mx.eval(nn.silu(mx.ones((1,) * dimensions)), nn.gelu(mx.ones((1,) * dimensions)))

thread = threading.Thread(target=train)
thread.start()
thread.join()
"""

FORK = """
import os, signal, sys
import mlx.core as mx
from mlx_openelm import generate, load

used = sys.argv[1] == "used"
if used:
    model, tokenizer = load("tiny")
for use in sys.argv[2:]:
    if not os.fork():
        signal.alarm(60)  # a process that waits forever ends by it
        try:
            if use == "load":
                model, tokenizer = load("tiny")
            generate(model, tokenizer, "To be", max_tokens=2)
            print("generated", flush=True)
        except ValueError as error:
            print(error, flush=True)
        sys.exit()
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status:
        sys.exit(status)
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="Thread.join waits for the system's thread")
def test_a_process_whose_thread_trained_ends_normally(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"to be {n}"}) + "\n" for n in range(40)))
    run(TRAIN, str(tmp_path), str(tmp_path / "adapter"))


@pytest.mark.skipif(sys.platform != "linux", reason="macOS's own libraries do not survive a fork")
def test_a_process_forked_after_mlx_was_used_says_so():
    """Whether it loads a model, or generates with one loaded before."""
    assert run(FORK, "used", "load", "generate").count('"spawn" or "forkserver"') == 2


@pytest.mark.skipif(sys.platform != "linux", reason="macOS's own libraries do not survive a fork")
def test_a_process_forked_before_can_generate():
    assert run(FORK, "unused", "load") == "generated\n"
