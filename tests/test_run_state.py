"""Checkpoints: complete or absent, kept and removed as configured, and damage is reported."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.run.state import Checkpoints, RunState

import mlx.core as mx
import pytest
from processes import environment


def tensors(step: int) -> dict[str, mx.array]:
    """A state like an updater's, different at each step; the optimizer counts in 64 bits."""
    weight = mx.random.normal((64, 64), key=mx.random.key(step))
    count = mx.array(step, dtype=mx.uint64)
    return {"weights.layer.lora_a": weight, "optimizer.layer.m": weight * 0.1, "optimizer.step": count}


def checkpoints(folder: Path, **options) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", **{"keep_last": 2} | options)


def no_warning(line: str) -> None:
    pytest.fail(line)


def test_a_saved_state_is_loaded_bit_for_bit(tmp_path):
    state = RunState(step=7, trained_tokens=123456, seconds=1.1, window_loss=2.000000000000001, window_tokens=9,
                     reported=1 / 3, validated=5, val_loss=0.1 + 0.2, best_step=5, best_loss=0.1, stale=2)  # fmt: skip
    path = checkpoints(tmp_path).save(state, tensors(7))
    assert path == tmp_path / "checkpoints" / "0000007"
    loaded = checkpoints(tmp_path).load(no_warning)
    assert loaded is not None and loaded[0] == state
    assert loaded[1].keys() == tensors(7).keys()
    for name, tensor in tensors(7).items():
        assert loaded[1][name].dtype == tensor.dtype and mx.array_equal(loaded[1][name], tensor).item(), name


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    assert checkpoints(tmp_path).load(no_warning) is None
    assert "starts from the beginning" in checkpoints(tmp_path).advice()


def test_the_last_every_nth_and_the_best_are_kept(tmp_path):
    kept = checkpoints(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 110, 10):
        kept.save(RunState(step=step, best_step=30 if step >= 30 else None), tensors(step))
        assert kept.steps()[-1] == step
    assert kept.steps() == [30, 40, 80, 90, 100]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "0000030"
    kept.save(RunState(step=110, best_step=110), tensors(110))
    assert kept.steps() == [40, 80, 100, 110]
    assert (tmp_path / "checkpoints" / "best").resolve() == tmp_path / "checkpoints" / "0000110"
    assert not [entry for entry in (tmp_path / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_older_checkpoints_are_removed_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    kept = checkpoints(tmp_path, keep_last=1)
    kept.save(RunState(step=1), tensors(1))
    seen = []
    write, rename = mx.save_safetensors, Path.rename
    monkeypatch.setattr(mx, "save_safetensors", lambda *args: seen.append(kept.steps()) or write(*args))
    monkeypatch.setattr(Path, "rename", lambda *args: seen.append(kept.steps()) or rename(*args))
    kept.save(RunState(step=2), tensors(2))
    # At the weights, the optimizer, and the rename of the folder; then come the links.
    assert seen[:3] == [[1]] * 3 and kept.steps() == [2]


def _cut(path: Path) -> None:
    os.truncate(path / "weights.safetensors", 1000)


def _flip(path: Path) -> None:
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def _remove(path: Path) -> None:
    (path / "weights.safetensors").unlink()


def _garble(path: Path) -> None:
    (path / "state.json").write_text('{"version": 1, "state"')


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (_cut, "weights.safetensors has 1,000 bytes"),
        (_flip, "checksum of optimizer.safetensors"),
        (_remove, "weights.safetensors cannot be read (No such file"),
        (_garble, "state.json cannot be read"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path, harm, named):
    kept = checkpoints(tmp_path)
    for step in (1, 2):
        kept.save(RunState(step=step), tensors(step))
    harm(kept.path(2))
    messages: list[str] = []
    state, loaded = kept.load(messages.append)
    assert state.step == 1 and mx.array_equal(loaded["optimizer.step"], mx.array(1)).item()
    assert len(messages) == 1 and named in messages[0] and "0000002" in messages[0]
    assert "step 1 is intact" in kept.advice()
    # Reaching that step again replaces the damaged checkpoint.
    kept.save(RunState(step=2), tensors(2))
    assert kept.load(no_warning)[0].step == 2

    for step in kept.steps():
        harm(kept.path(step))
    with pytest.raises(OpenELMError, match="All checkpoints .* are damaged; start a new run with overwrite=True"):
        kept.load(messages.append)


def test_damage_to_the_adapter_in_a_checkpoint_is_detected(tmp_path):
    def export(folder: Path) -> None:
        (folder / "adapters.safetensors").write_bytes(b"an adapter")

    kept = checkpoints(tmp_path, export=export)
    for step in (1, 2):
        kept.save(RunState(step=step), tensors(step))
    (kept.path(2) / "adapters.safetensors").write_bytes(b"an Adapter")
    messages: list[str] = []
    assert kept.load(messages.append)[0].step == 1
    assert "the checksum of adapters.safetensors is wrong" in messages[0]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    kept = checkpoints(tmp_path)
    kept.save(RunState(step=1), tensors(1))
    before = {path.name: path.read_bytes() for path in kept.path(1).iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OpenELMError, match="0000002 failed: No space left on device.* step 1 is intact.*resume"):
        kept.save(RunState(step=2), tensors(2))
    assert {path.name: path.read_bytes() for path in kept.path(1).iterdir()} == before
    assert [entry.name for entry in kept.folder.iterdir()] == ["0000001"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_actually_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        kept = checkpoints(disk)
        kept.save(RunState(step=1), tensors(1))
        with pytest.raises(OpenELMError, match=r"No space left on device.* step \d is intact"):
            for step in range(2, 5):
                kept.save(RunState(step=step), tensors(step))
        state, _ = checkpoints(disk).load(no_warning)
        assert kept.steps()[-1] == state.step >= 1
    finally:
        subprocess.run(["umount", disk], check=True)


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run_state import checkpoints, tensors
from mlx_openelm.training.run.state import RunState
kept = checkpoints(Path({folder!r}), keep_last=2, keep_every=10)
kept.remove_leftovers()
start = (kept.load(print) or (RunState(), None))[0].step
print("ready", flush=True)
for step in range(start + 1, start + 1000000):
    kept.save(RunState(step=step, best_step=step // 7 * 7 or None), tensors(step))
"""


def test_checkpoints_are_complete_whenever_the_process_is_killed(tmp_path):
    script = SAVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    reached = 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment())
        assert process.stdout.readline() == b"ready\n"
        kept, deadline = checkpoints(tmp_path), time.monotonic() + 60
        while max(kept.steps(), default=0) < reached + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.0137 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in kept.steps():  # all of them, not only the newest
            assert mx.array_equal(kept.tensors(step)["optimizer.step"], mx.array(step)).item()
            record = json.loads((kept.path(step) / "state.json").read_text())
            assert record["state"]["step"] == step
        newest = kept.load(no_warning)[0].step
        assert newest > reached
        assert newest - 1 in kept.steps() and set(range(10, newest, 10)) <= set(kept.steps())
        reached = newest


def test_removing_leaves_other_files(tmp_path):
    kept = checkpoints(tmp_path)
    kept.save(RunState(step=1, best_step=1), tensors(1))
    (kept.folder / "notes.txt").write_text("mine")
    (kept.folder / ".0000002.partial-4194305").mkdir()
    kept.remove_all()
    assert [entry.name for entry in kept.folder.iterdir()] == ["notes.txt"]
    shutil.rmtree(kept.folder)
    kept.save(RunState(step=1), tensors(1))
    kept.remove_all()
    assert not kept.folder.exists()
