"""Tensors read one at a time, at byte offsets of any file: values, memory, and files that end too soon."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import dequantize_weights, quantize_weights
from mlx_openelm.formats.raw import Span, tensors
from mlx_openelm.formats.safetensors import Tensor, Weights, streaming

import mlx.core as mx
import numpy as np
import pytest


def write(path: Path, *parts: bytes) -> list[int]:
    """Write the parts one after the other to `path`; returns their offsets."""
    path.write_bytes(b"".join(parts))
    return [sum(map(len, parts[:i])) for i in range(len(parts))]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint32", "int32", "uint16", "uint8", "int8"])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), ()])
def test_values_of_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    offsets = write(tmp_path / "f", b"some header", values.tobytes(), b"rest")
    unread = tensors(tmp_path / "f", {"x": Span(getattr(mx, dtype), shape, offsets[1])})
    assert list(unread) == ["x"]
    assert (unread["x"].dtype, unread["x"].shape) == (getattr(mx, dtype), shape)
    assert unread["x"].nbytes == values.nbytes
    read = unread["x"].read()
    assert read.dtype == getattr(mx, dtype)
    assert np.array_equal(np.array(read), values)


def test_bfloat16(tmp_path: Path) -> None:
    # 1, -2, 0.5 and infinity, by their bits.
    bits = np.array([0x3F80, 0xC000, 0x3F00, 0x7F80], dtype="<u2")
    write(tmp_path / "f", b"x", bits.tobytes())
    read = tensors(tmp_path / "f", {"x": Span(mx.bfloat16, (2, 2), 1)})["x"].read()
    assert read.dtype == mx.bfloat16
    assert read.astype(mx.float32).tolist() == [[1.0, -2.0], [0.5, float("inf")]]


def test_many_tensors_of_one_file(tmp_path: Path) -> None:
    """More tensors than a process may open files, in another order, two of them overlapping."""
    values = np.arange(3000, dtype=np.float32)
    write(tmp_path / "f", values.tobytes())
    order = np.random.default_rng(0).permutation(2999)
    spans = {f"layer.{i}.npy": Span(mx.float32, (2,), 4 * int(i)) for i in order}
    open_files = Path("/dev/fd")
    before = len(list(open_files.iterdir()))
    unread = tensors(tmp_path / "f", spans)
    assert list(unread) == list(spans)
    assert all(unread[f"layer.{i}.npy"].read().tolist() == [i, i + 1] for i in order)
    assert len(list(open_files.iterdir())) <= before


def test_empty_tensors(tmp_path: Path) -> None:
    write(tmp_path / "f", b"")
    assert tensors(tmp_path / "f", {}) == {}
    empty = tensors(tmp_path / "f", {"x": Span(mx.float32, (0, 3), 0)})["x"].read()
    assert (empty.shape, empty.dtype) == ((0, 3), mx.float32)


def test_values_are_read_when_needed(tmp_path: Path) -> None:
    write(tmp_path / "f", np.zeros(4, np.float32).tobytes())
    unread = tensors(tmp_path / "f", {"x": Span(mx.float32, (4,), 0)})["x"]
    assert unread.read().tolist() == [0, 0, 0, 0]
    with (tmp_path / "f").open("r+b") as file:
        file.write(np.full(4, 6, np.float32).tobytes())
    assert unread.read().tolist() == [6, 6, 6, 6]


def test_memory_is_bounded_by_one_tensor() -> None:
    """40 tensors of 10 MB, read one after the other in a separate process."""
    code = """
import resource, sys, tempfile
from pathlib import Path
from mlx_openelm.formats.raw import Span, tensors
from mlx_openelm.formats.safetensors import Weights
import mlx.core as mx
size, count = 2_500_000, 40
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "f"
    with path.open("wb") as file:
        file.truncate(4 * size * count)
    unit = 1 if sys.platform == "darwin" else 1024
    mx.eval(mx.zeros(size) + 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    weights = Weights(tensors(path, {str(i): Span(mx.float32, (size,), 4 * size * i) for i in range(count)}))
    total = 0
    for name in list(weights):
        total += len(memoryview(weights.take(name).view(mx.uint8)))
    print(total, len(weights), mx.get_peak_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, left, peak, grown = map(int, done.stdout.split())
    assert (total, left) == (400_000_000, 0)
    assert peak < 25_000_000  # the last, while the next is read
    assert grown < 40_000_000


@pytest.mark.parametrize(("offset", "size"), [(0, 26), (100, 1), (99, 1), (97, 1), (-4, 1), (10**15, 1)])
def test_a_tensor_beyond_the_end_is_refused(tmp_path: Path, offset: int, size: int) -> None:
    write(tmp_path / "f", bytes(100))
    with pytest.raises(RequestError, match="is damaged: w is cut off"):
        tensors(tmp_path / "f", {"w": Span(mx.float32, (size,), offset)})


def test_unreadable_files_and_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        tensors(tmp_path / "absent", {})
    write(tmp_path / "f", bytes(100))
    with pytest.raises(RequestError, match="stores w in a type"):
        tensors(tmp_path / "f", {"w": Span(mx.complex64, (1,), 0)})


def test_a_file_cut_short_or_removed_before_it_is_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "f", bytes(4000))
    unread = tensors(tmp_path / "f", {"w": Span(mx.float32, (1000,), 0)})["w"]
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(RuntimeError, match="ends before its tensors do"):
        unread.read()
    (tmp_path / "f").unlink()
    with pytest.raises(RuntimeError, match="No such file"):
        unread.read()


# Weights: tensors by name.


def counted(reads: list[str]) -> Weights:
    def read(name: str) -> mx.array:
        reads.append(name)
        return mx.full((2, 3), len(name), mx.float16)

    return Weights({name: Tensor(mx.float16, (2, 3), partial(read, name)) for name in ("a", "bb", "ccc")})


def test_only_requested_tensors_are_read() -> None:
    reads: list[str] = []
    weights = counted(reads)
    assert ("a" in weights, "d" in weights, list(weights), len(weights)) == (True, False, ["a", "bb", "ccc"], 3)
    cast = weights.tensors["bb"].cast(mx.float32)
    assert (cast.dtype, cast.shape, cast.nbytes, weights.tensors["bb"].nbytes) == (mx.float32, (2, 3), 24, 12)
    assert reads == []
    assert cast.read().dtype == mx.float32
    assert weights["bb"].tolist() == [[2.0] * 3] * 2
    assert reads == ["bb", "bb"]
    assert weights.take("ccc").tolist() == [[3.0] * 3] * 2
    assert list(weights) == ["a", "bb"]
    with pytest.raises(KeyError):
        weights.take("ccc")


def test_packed_parts_are_made_together_and_once() -> None:
    reads: list[str] = []

    def read() -> mx.array:
        reads.append("w")
        return mx.arange(128, dtype=mx.float32).reshape(2, 64)

    weights = Weights(
        {"w.weight": Tensor(mx.float32, (2, 64), read), "n": Tensor(mx.float32, (1,), lambda: mx.ones(1))}
    )
    packed = quantize_weights(weights, {"w": Quantization(32, 8)})
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in packed.tensors.items()}
    assert expected == {
        "w.weight": (mx.uint32, (2, 16)),
        "w.scales": (mx.bfloat16, (2, 2)),
        "w.biases": (mx.bfloat16, (2, 2)),
        "n": (mx.float32, (1,)),
    }
    taken = {name: packed.take(name) for name in list(packed)}
    assert {name: (array.dtype, array.shape) for name, array in taken.items()} == expected
    assert reads == ["w"]
    # 0 to 31 in 255 steps, within bfloat16's precision.
    steps = np.array(taken["w.scales"].astype(mx.float32))[:, 0]
    assert np.allclose(np.abs(steps), 31 / 255, rtol=2**-8)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_unpacking_follows_the_definition_of_each_mode(mode: str) -> None:
    weights = Weights.of_arrays({"w.weight": mx.random.normal((4, 64), key=mx.random.key(0))})
    choices = {"w": Quantization.make(mode)}
    packed = dict(quantize_weights(weights, choices))
    full = dequantize_weights(Weights.of_arrays(packed), choices, mx.float32)
    assert (list(full), full.tensors["w.weight"].shape) == (["w.weight"], (4, 64))
    codes = (np.array(packed["w.weight"])[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(4, 64)
    if mode == "affine":
        scales, biases = (np.array(packed[f"w.{part}"].astype(mx.float32)) for part in ("scales", "biases"))
        expected = codes * scales.repeat(64, 1) + biases.repeat(64, 1)
    else:  # OCP microscaling: a power of two for every 32 values in E2M1
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        signs = 1 - 2.0 * (codes >> 3)
        expected = signs * values[codes & 7] * 2.0 ** (np.array(packed["w.scales"]).astype(int) - 127).repeat(32, 1)
    assert np.allclose(np.array(full["w.weight"]), expected, rtol=1e-6, atol=1e-7)


def test_caches_are_limited_only_for_the_time_of_streaming() -> None:
    before = mx.set_cache_limit(12345)
    try:
        with pytest.raises(KeyError), streaming():
            limit = mx.set_cache_limit(0)
            assert 12345 < limit < 10**9
            raise KeyError
        assert mx.set_cache_limit(before) == 12345
    finally:
        mx.set_cache_limit(before)
