"""Several processes that train together: the same losses as one, and what happens when one dies."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.training.run.distributed import Processes

import mlx.core as mx
import pytest
from in_process import run_here
from training_runs import command, environment, metrics, write_run_folder

LAUNCH = Path(sys.executable).parent / "mlx.launch"
# Adam would amplify the smallest gradients, and so rounding errors.
FLAGS = ("--train", "--model", "model", "--data", "data", "--batch-size", 4, "--grad-accumulation-steps", 2,
         "--max-seq-length", 48, "--optimizer", "sgd", "--learning-rate", 1e-2, "--rank", 4,
         "--max-grad-norm", 1, "--steps-per-report", 3, "--steps-per-eval", 5, "--val-batches", -1,
         "--save-every", 2)  # fmt: skip
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")


def _free_ports() -> int:
    """The first of two consecutive free ports, below those that systems give to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def launch(*words: object, folder: Path) -> subprocess.Popen[str]:
    """Two processes that run `words` with Python, their output combined."""
    start = [LAUNCH, "-n", 2, "-p", _free_ports(), "--backend", "ring", "--python", sys.executable, "--", *words]
    return subprocess.Popen(list(map(str, start)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=environment(), cwd=folder)  # fmt: skip


def launch_lora(*args: object, folder: Path) -> subprocess.Popen[str]:
    return launch(*command(*args, python=()), folder=folder)


@pytest.fixture
def here(tmp_path) -> Path:
    return write_run_folder(tmp_path)


# One of the processes gets a signal in a step; each leaves its number in a file. They compute on the CPU, as the run
# does with which they are compared.
SIGNALLED = """
import os, sys
from pathlib import Path
import mlx_openelm
from mlx_openelm.training.run import trainer
from mlx_openelm.cli.main import main
import mlx.core as mx
mx.set_default_device(mx.cpu)
rank, victim, number = os.environ["MLX_RANK"], sys.argv[1], int(sys.argv[2])
Path("process-" + rank).write_text(str(os.getpid()))
update = trainer.Updater.update
def signalled(self, batches, num_targets, rate, step):
    if step == 5 and rank == victim:
        os.kill(os.getpid(), number)
    return update(self, batches, num_targets, rate, step)
trainer.Updater.update = signalled
main(sys.argv[3:])
"""


def _kill_and_continue(here: Path, victim: int, number: int, iters: int) -> str:
    """End one of two processes with a signal, then resume; returns the output of the first run."""
    (here / "signalled.py").write_text(SIGNALLED)
    words = ("signalled.py", victim, int(number), "lora", *FLAGS, "--iters", iters, "--adapter-path", "two")
    said = launch(*words, folder=here).communicate(timeout=60)[0]
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((here / f"process-{rank}").read_text()), 0)
    words = ("signalled.py", "none", 0, "lora", "--resume", "--adapter-path", "two", "--json")
    again = launch(*words, folder=here)
    output = again.communicate(timeout=120)[0]
    results = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) == 1 and results[0]["steps"] == iters, output  # only one of them prints
    return said


def _assert_as_one_process(here: Path, iters: int) -> None:
    alone = run_here("lora", *FLAGS, "--iters", iters, "--adapter-path", "one", folder=here)
    assert alone.returncode == 0, alone.stderr
    one, two = metrics(here / "one"), metrics(here / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) > 6
    for ours, theirs in zip(two, one, strict=True):
        # The norm of a gradient depends on every weight, so its differences add up sooner.
        norms = ours.pop("grad_norm", 0.0), theirs.pop("grad_norm", 0.0)
        assert ours == pytest.approx(theirs, rel=2e-5) and norms[0] == pytest.approx(norms[1], rel=1e-3)
    weights = [mx.load(str(here / name / "adapters.safetensors")) for name in ("one", "two")]
    for name in weights[0]:
        assert mx.allclose(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4).item(), name


def test_two_processes_train_like_one_even_if_one_is_killed(here):
    said = _kill_and_continue(here, 1, signal.SIGKILL, iters=10)
    assert said.count("Step 0: validation loss") == 1
    assert "rank 1 exited with code -9" in said
    _assert_as_one_process(here, iters=10)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_run_resumes_whichever_process_ended_and_how(here, victim, number):
    said = _kill_and_continue(here, victim, number, iters=40)
    if number != signal.SIGKILL:  # all processes agree to stop, and save
        assert re.search(r"Step \d+: saved two.checkpoints.*", said)
        assert "gone" not in said and "Stopped after step" in said
    _assert_as_one_process(here, iters=40)


FAILING = """
import os, sys
import mlx_openelm
from mlx_openelm.training.run import trainer
from mlx_openelm.cli.main import main
update = trainer.Updater.update
def fail(self, batches, num_targets, rate, step):
    if step == 5 and os.environ["MLX_RANK"] == sys.argv[1]:
        raise ZeroDivisionError("by chance")
    return update(self, batches, num_targets, rate, step)
trainer.Updater.update = fail
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_ends_the_others(here, rank):
    (here / "failing.py").write_text(FAILING)
    process = launch("failing.py", rank, "lora", *FLAGS, "--iters", 50, folder=here)
    output = process.communicate(timeout=60)[0]
    assert "ZeroDivisionError: by chance" in output and "exited with code 1" in output
    # The checkpoint of step 5, which has the best validation loss so far.
    assert [path.name for path in sorted((here / "adapters" / "checkpoints").glob("0*"))] == ["0000004", "0000005"]


@pytest.mark.slow
def test_a_batch_size_that_processes_cannot_share_is_refused(here):
    output = launch_lora(*FLAGS, "--batch-size", 3, folder=here).communicate(timeout=60)[0]
    assert "error: --batch-size 3 cannot be shared by 2 processes; take a multiple of 2, such as 4." in output
    assert not (here / "adapters").exists()


SHARING = """
import os
import mlx_openelm
import mlx.core as mx
from mlx_openelm.errors import RequestError
from mlx_openelm.training.run.distributed import Processes
p = Processes()
assert (p.size, p.leads, p.rank) == (2, p.rank == 0, int(os.environ["MLX_RANK"]))
assert p.share("Ünï" * 100 if p.leads else "other") == "Ünï" * 100
assert p.share("" if p.leads else None) == ""
assert p.any(p.rank == 1) and not p.any(False) and p.sum(p.rank + 1.5) == 4 and p.largest(p.rank * 7) == 7
own = {"b": mx.array([-0.0, float("nan"), 1e-42, 3.0]), "c": mx.array(2**40 + 1, dtype=mx.uint64),
       "a": mx.random.normal((3, 5), key=mx.random.key(1)).astype(mx.bfloat16).T, "e": mx.zeros((0, 3))}
theirs = own if p.leads else {name: mx.ones_like(value) for name, value in own.items()}
got = p.share_tensors(theirs)
for name, value in own.items():
    assert got[name].dtype == value.dtype and got[name].shape == value.shape
    if value.size:
        bits = [mx.contiguous(array).reshape(-1).view(mx.uint8) for array in (got[name], value)]
        same = bits[0] == bits[1]
        assert mx.all(same).item(), name
p.check_equal("words", "same")
try:
    p.check_equal("words", f"other {p.rank}")
except RequestError as error:
    assert "2 processes have different words" in str(error)
    print("fine", flush=True)
"""


def test_processes_exchange_values(tmp_path):
    (tmp_path / "sharing.py").write_text(SHARING)
    output = launch("sharing.py", folder=tmp_path).communicate(timeout=60)[0]
    assert output.count("fine") == 2, output


def test_a_single_process_needs_no_communication():
    processes = Processes()
    assert (processes.rank, processes.size, processes.leads) == (0, 1, True)
    assert processes.share("x") == "x" and processes.any(True) and not processes.any(False)
    processes.check_batch(3)
    processes.check_equal("data", "x")
    with pytest.raises(ZeroDivisionError), processes.together():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="ring"), processes.together():
        raise RuntimeError("[ring] something")  # there are no peers


def test_errors_of_others_name_them():
    processes = Processes()
    processes.rank, processes.size = 1, 2
    with pytest.raises(RequestError, match="Process 1: no data"), processes.together():
        raise RequestError("no data")
    with pytest.raises(RequestError, match="batch_size 5 cannot be shared by 2 .* such as 6"):
        processes.check_batch(5)
    before = signal.getsignal(signal.SIGTERM)
    try:
        gone = pytest.raises(OpenELMError, match="Process 1: another process of the run is gone.*resume")
        with gone, processes.together():
            raise RuntimeError("[ring] connection to a peer was lost")
        with pytest.raises(RuntimeError, match="other"), processes.together():
            raise RuntimeError("other")
    finally:
        signal.signal(signal.SIGTERM, before)
