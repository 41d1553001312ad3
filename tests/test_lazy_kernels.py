"""Kernels are looked up when a CPU first needs them: imports and GPUs touch neither library nor sources."""

from __future__ import annotations

import json
import subprocess
import sys

from mlx_openelm import native

import pytest

# Records what is opened, imported or loaded from the kernels' folder; `on_a_gpu()` simulates a GPU.
WATCHED = """
import json, sys
from types import SimpleNamespace
touched = []
def watch(event, arguments):
    if event in ("open", "import", "ctypes.dlopen", "os.listdir", "os.scandir"):
        names = [a for a in arguments if isinstance(a, str) and "mlx_openelm/native/" in a]
        touched.extend(name for name in names if not name.endswith((".py", ".pyc")) and "__pycache__" not in name)
sys.addaudithook(watch)
def on_a_gpu():
    import mlx.core as mx
    mx.default_device = lambda: SimpleNamespace(type=mx.DeviceType.gpu)
def on_a_cpu():
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
"""


def touched_by(code: str) -> list[str]:
    """The kernel files that `code` touches, run in a separate process."""
    command = [sys.executable, "-c", f"{WATCHED}\n{code}\nprint(json.dumps(touched))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


GENERATE = "from mlx_openelm import generate, load; print(generate(*load('tiny'), 'ROMEO.', max_tokens=3))"


def test_an_import_touches_nothing():
    modules = "mlx_openelm, mlx_openelm.native, mlx_openelm.ops.layers, mlx_openelm.model, mlx_openelm.loading"
    assert touched_by(f"import {modules}, mlx_openelm.generation.stream, mlx_openelm.training.finetune") == []


# Without the picture of the losses, most of the time of a short run.
TRAIN = """
from pathlib import Path
from mlx_openelm import FineTuneOptions, finetune
from mlx_openelm.training.run import metrics
metrics.draw = lambda curves, path, title="": path.write_bytes(b"")
(Path(FOLDER) / "train.jsonl").write_text('{"text": "To be, or not to be"}\\n')
finetune("tiny", FineTuneOptions(train=True, data=FOLDER, iters=1, batch_size=1, adapter_path=FOLDER + "/adapter"))
"""
WORKS = {
    "generate": GENERATE,
    "lora": TRAIN,
    "info": "from mlx_openelm.jobs.summary import summarize; summarize('tiny').memory",
    "has_kernels": (
        "from mlx_openelm import backend\nassert backend.multiplies_packed('mxfp4') and not backend.has_kernels()"
    ),
    "doctor": "from mlx_openelm.cli import doctor; print(list(doctor.examine()))",
}


def test_with_a_gpu_nothing_is_touched(tmp_path):
    """By any of them, one after the other in a process."""
    works = (f"{work}\nassert not touched, ({name!r}, touched)" for name, work in WORKS.items())
    assert touched_by("\n".join([f"FOLDER = {str(tmp_path)!r}\non_a_gpu()", *works])) == []


@pytest.mark.skipif(native.kernels is None, reason="the kernels are not used")
def test_the_first_forward_pass_on_a_cpu_loads_them():
    code = """
on_a_cpu()
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM
config = {"model_dim": 64, "head_dim": 16, "num_transformer_layers": 1, "vocab_size": 50, "ffn_multipliers": [1.0],
          "qkv_multipliers": [1.0]}
model = OpenELM(ModelConfig.from_dict(config))
assert touched == [], touched
mx.eval(model(mx.array([[1, 2]])))
"""
    touched = touched_by(f"import mlx.core as mx\n{code}")
    assert any("kernels." in name for name in touched) and any("/src/" in name for name in touched)


@pytest.mark.skipif(native.kernels is None, reason="the kernels are not used")
def test_two_threads_at_once_load_them_once():
    code = """
import threading
from mlx_openelm import native
seen, start = [], threading.Barrier(4)
original, calls = native.examine, []
native.examine = lambda folder: (calls.append(1), original(folder))[1]
def ask(): start.wait(); seen.append((native.kernels, native.status))
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(calls) == 1 and len(seen) == 4 and all(found == seen[0] for found in seen), (calls, seen)
"""
    assert touched_by(code) != []


def test_unknown_attributes_still_raise():
    with pytest.raises(AttributeError, match="has no attribute 'kernel'"):
        native.kernel  # noqa: B018
