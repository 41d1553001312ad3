"""Folders and files appear complete or not at all: kills, threads, and concurrent changes by others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import atomic

import pytest


def model(folder: Path, text: str) -> Path:
    """A folder that looks like a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed_between_the_renames(target: Path) -> int:
    """Overwrite `target` in a process that dies after it moved the old folder away, before the new one is in place."""
    code = """
import os, signal, sys
from pathlib import Path
from mlx_openelm.formats import atomic
rename = Path.rename
def once(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once
with atomic.new_folder(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "config.json").write_text("new")
"""
    with subprocess.Popen([sys.executable, "-c", code, str(target)]) as process:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not target.exists() and len(names(target.parent)) == 2  # the old one and the new one
    return process.pid


def test_the_next_run_restores_what_a_killed_one_moved_away(tmp_path: Path) -> None:
    target = model(tmp_path / "out", "old")
    killed_between_the_renames(target)
    with pytest.raises(RequestError, match="exists; choose another"), atomic.new_folder(target):
        pass
    assert (target / "config.json").read_text() == "old"
    with atomic.new_folder(target, overwrite=True) as partial:
        model(partial, "newer")
    assert (target / "config.json").read_text() == "newer" and names(tmp_path) == {"out"}


def test_it_is_restored_even_if_the_next_run_fails(tmp_path: Path) -> None:
    target = model(tmp_path / "out", "old")
    killed_between_the_renames(target)
    with pytest.raises(OpenELMError), atomic.new_folder(target, overwrite=True):
        raise OSError("no space")
    assert (target / "config.json").read_text() == "old" and names(tmp_path) == {"out"}


def test_the_check_before_long_work_restores_it(tmp_path: Path) -> None:
    target = model(tmp_path / "out", "old")
    killed_between_the_renames(target)
    assert atomic.check_target(target, overwrite=True) == target
    assert (target / "config.json").read_text() == "old"


def test_folders_moved_away_by_a_running_process_are_left_alone(tmp_path: Path) -> None:
    previous = model(tmp_path / f".out.partial-{os.getppid()}-previous", "old")
    assert not atomic.check_target(tmp_path / "out").exists()
    with atomic.new_folder(tmp_path / "out") as partial:
        model(partial, "new")
    assert names(tmp_path) == {"out", previous.name}


def test_leftovers_of_a_dead_process_with_our_own_pid(tmp_path: Path) -> None:
    """Pids restart in a container, so the killed process may have had ours."""
    for name in ("", "-2", "-previous", "-2-previous"):
        model(tmp_path / f".out.partial-{os.getpid()}{name}", "left")
    model(tmp_path / "out", "old")
    model(tmp_path / ".out.partial-x", "not ours")
    with atomic.new_folder(tmp_path / "out", overwrite=True) as partial:
        model(partial, "new")
    assert names(tmp_path) == {"out", ".out.partial-x"} and (tmp_path / "out" / "config.json").read_text() == "new"


def test_a_folder_whose_only_copy_was_moved_away_survives_writing_a_file_of_that_name(tmp_path: Path) -> None:
    previous = model(tmp_path / f".out.partial-{os.getpid()}-previous", "old")
    with atomic.new_file(tmp_path / "out") as partial:
        partial.write_text("new")
    assert (previous / "config.json").read_text() == "old" and names(tmp_path) == {"out", previous.name}


def test_a_folder_that_holds_more_than_a_model_is_never_replaced(tmp_path: Path) -> None:
    target = model(tmp_path / "out", "old")
    (target / "more").mkdir()
    with pytest.raises(RequestError, match="contains files that are not part of a model"):
        atomic.check_target(target, overwrite=True)


def test_nested_writers_of_one_target_have_separate_folders(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic.new_folder(target, overwrite=True) as first:
        model(first, "first")
        with atomic.new_folder(target, overwrite=True) as second:
            assert second != first and (first / "config.json").read_text() == "first"
            assert names(tmp_path) == {f".out.partial-{os.getpid()}", f".out.partial-{os.getpid()}-2"}
            model(second, "second")
        assert (target / "config.json").read_text() == "second"
    assert (target / "config.json").read_text() == "first" and names(tmp_path) == {"out"}


def test_nested_writers_of_one_file_have_separate_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they spell its path differently."""
    monkeypatch.chdir(tmp_path)
    with atomic.new_file(Path("a.gguf")) as first:
        first.write_text("first")
        with atomic.new_file(tmp_path / "a.gguf") as second:
            second.write_text("second")
        assert Path("a.gguf").read_text() == "second"
    assert Path("a.gguf").read_text() == "first" and names(tmp_path) == {"a.gguf"}


def test_threads_that_overwrite_one_target_leave_one_complete_folder(tmp_path: Path) -> None:
    target, errors = model(tmp_path / "out", "old"), []
    start = threading.Barrier(6)

    def write(number: int) -> None:
        try:
            start.wait()
            for _ in range(10):
                with atomic.new_folder(target, overwrite=True) as partial:
                    model(partial, str(number))
                    (partial / "weights").write_text(str(number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(tmp_path) == {"out"}
    assert (target / "config.json").read_text() == (target / "weights").read_text() in "012345"


def test_a_target_that_appeared_meanwhile_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(OpenELMError, match="created by another process in the meantime"),
        atomic.new_folder(target) as partial,
    ):
        model(partial, "ours")
        model(target, "theirs")
    assert (target / "config.json").read_text() == "theirs" and names(tmp_path) == {"out"}


def test_a_failed_rename_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = model(tmp_path / "out", "old"), Path.rename

    def fails(self: Path, to: Path) -> Path:
        if self.name.endswith(str(os.getpid())):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OpenELMError, match="Writing .* failed"), atomic.new_folder(target, overwrite=True) as partial:
        model(partial, "new")
    assert (target / "config.json").read_text() == "old" and names(tmp_path) == {"out"}


def test_the_source_cannot_be_the_target_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    os.link(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(RequestError, match=r"b\.gguf is the model"):
        atomic.keep_apart(tmp_path / "b.gguf", tmp_path / "a.gguf", "the model")
    # A file system that ignores case.
    monkeypatch.setattr(os.path, "samefile", lambda one, other: str(one).lower() == str(other).lower())
    (tmp_path / "OUT").mkdir(exist_ok=True)
    model(tmp_path / "out" / "model", "old")
    for source in (tmp_path / "out", tmp_path / "out" / "model" / "config.json"):
        with pytest.raises(RequestError, match="OUT is the model, or contains it"):
            atomic.keep_apart(tmp_path / "OUT", source, "the model")
    monkeypatch.chdir(tmp_path / "out" / "model")
    with pytest.raises(RequestError, match="is the current folder or a parent of it"):
        atomic.check_target(tmp_path / "OUT", overwrite=True)


def test_the_source_cannot_be_the_target(tmp_path: Path) -> None:
    atomic.keep_apart(tmp_path / "out", tmp_path / "model", "the model")
    atomic.keep_apart(tmp_path / "model" / "out", tmp_path / "model", "the model")  # beside its files
    for source in (tmp_path / "out", tmp_path / "out" / "model" / "config.json"):
        with pytest.raises(RequestError, match="out is the model, or contains it; choose another save_path"):
            atomic.keep_apart(tmp_path / "out", source, "the model", "--save-path")


@pytest.mark.parametrize("name", ["file/x", "file/x/y"])
def test_a_path_through_a_file_is_refused_before_long_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    message = rf"{tmp_path}/{name} cannot be created: {tmp_path}/file is a file, not a folder\.$"
    with pytest.raises(RequestError, match=message):
        atomic.check_target(tmp_path / name)
    with pytest.raises(RequestError, match=message), atomic.new_file(tmp_path / name):
        pass
