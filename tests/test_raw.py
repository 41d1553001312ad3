"""Tensors at byte offsets of any file: values, laziness, memory, and files that end too soon."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.formats.raw import Span, read_lazily

import mlx.core as mx
import numpy as np
import pytest


def write(path: Path, *parts: bytes) -> list[int]:
    """The parts one after the other in `path`; returns where each begins."""
    path.write_bytes(b"".join(parts))
    return [sum(map(len, parts[:i])) for i in range(len(parts))]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint32", "int32", "uint16", "uint8", "int8"])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), ()])
def test_values(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    offsets = write(tmp_path / "f", b"some header", values.tobytes(), b"rest")
    read = read_lazily(tmp_path / "f", {"x": Span(getattr(mx, dtype), shape, offsets[1])})
    assert list(read) == ["x"]
    assert read["x"].dtype == getattr(mx, dtype)
    assert np.array_equal(np.array(read["x"]), values)


def test_bfloat16(tmp_path: Path) -> None:
    # 1, -2, 0.5 and infinity, by their bits.
    bits = np.array([0x3F80, 0xC000, 0x3F00, 0x7F80], dtype="<u2")
    write(tmp_path / "f", b"x", bits.tobytes())
    read = read_lazily(tmp_path / "f", {"x": Span(mx.bfloat16, (2, 2), 1)})["x"]
    assert read.dtype == mx.bfloat16
    assert read.astype(mx.float32).tolist() == [[1.0, -2.0], [0.5, float("inf")]]


def test_many_tensors_of_one_file(tmp_path: Path) -> None:
    """More of them than a process may have files open, in an order of their own, two of them overlapping."""
    values = np.arange(3000, dtype=np.float32)
    write(tmp_path / "f", values.tobytes())
    order = np.random.default_rng(0).permutation(2999)
    spans = {f"layer.{i}.npy": Span(mx.float32, (2,), 4 * int(i)) for i in order}
    open_files = Path("/dev/fd")
    before = len(list(open_files.iterdir()))
    read = read_lazily(tmp_path / "f", spans)
    assert len(list(open_files.iterdir())) <= before + 1
    assert list(read) == list(spans)
    assert all(read[f"layer.{i}.npy"].tolist() == [i, i + 1] for i in order)


def test_nothing(tmp_path: Path) -> None:
    write(tmp_path / "f", b"")
    assert read_lazily(tmp_path / "f", {}) == {}


def test_values_are_read_when_they_are_used(tmp_path: Path) -> None:
    write(tmp_path / "f", np.zeros(4, np.float32).tobytes())
    read = read_lazily(tmp_path / "f", {"x": Span(mx.float32, (4,), 0)})["x"] + 1
    with (tmp_path / "f").open("r+b") as file:
        file.write(np.full(4, 6, np.float32).tobytes())
    assert read.tolist() == [7, 7, 7, 7]


def test_memory_is_that_of_one_tensor() -> None:
    """40 tensors of 10 MB, read one after the other in a process of its own."""
    code = """
import resource, tempfile
from pathlib import Path
from mlx_openelm.formats.raw import Span, read_lazily
import mlx.core as mx
size, count = 2_500_000, 40
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "f"
    with path.open("wb") as file:
        file.truncate(4 * size * count)
    unit = 1 if __import__("sys").platform == "darwin" else 1024
    mx.eval(mx.zeros(size) + 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    tensors = read_lazily(path, {str(i): Span(mx.float32, (size,), 4 * size * i) for i in range(count)})
    total = 0
    for name in list(tensors):
        total += len(memoryview(mx.contiguous(tensors.pop(name)).view(mx.uint8)))
    print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == 400_000_000
    assert grown < 60_000_000


@pytest.mark.parametrize(("offset", "size"), [(0, 26), (100, 1), (99, 1), (-4, 1), (10**15, 1)])
def test_a_tensor_beyond_the_end_is_refused(tmp_path: Path, offset: int, size: int) -> None:
    write(tmp_path / "f", bytes(100))
    with pytest.raises(RequestError, match="is damaged: w is cut off"):
        read_lazily(tmp_path / "f", {"w": Span(mx.float32, (size,), offset)})


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_lazily(tmp_path / "absent", {})
    write(tmp_path / "f", bytes(100))
    with pytest.raises(RequestError, match="stores w in a type"):
        read_lazily(tmp_path / "f", {"w": Span(mx.complex64, (1,), 0)})


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "f", bytes(4000))
    read = read_lazily(tmp_path / "f", {"w": Span(mx.float32, (1000,), 0)})["w"]
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(RuntimeError):
        mx.eval(read)


def test_zipfile_stays_what_it_was_for_everybody_else(tmp_path: Path) -> None:
    """Threads that read archives and threads that read tensors do not notice each other."""
    np.savez(tmp_path / "a.npz", x=np.arange(5))
    write(tmp_path / "f", np.arange(4, dtype=np.float32).tobytes())
    wrong: list[object] = []

    def archives() -> None:
        for _ in range(50):
            with np.load(tmp_path / "a.npz") as arrays:
                wrong.extend([] if arrays["x"].tolist() == [0, 1, 2, 3, 4] else [arrays["x"]])
            loaded = mx.load(str(tmp_path / "a.npz"))["x"]
            wrong.extend([] if loaded.tolist() == [0, 1, 2, 3, 4] else [loaded])

    def tensors() -> None:
        for _ in range(50):
            read = read_lazily(tmp_path / "f", {"x": Span(mx.float32, (4,), 0)})["x"]
            wrong.extend([] if read.tolist() == [0, 1, 2, 3] else [read])

    threads = [threading.Thread(target=work) for work in (archives, tensors, tensors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sys.modules["zipfile"] is zipfile
