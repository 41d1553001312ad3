"""PyTorch's checkpoint files: the right values however a file was packed; hostile files are refused cheaply."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.formats import torch_file, torch_pickle
from mlx_openelm.formats.torch_tensors import StoredTensor

import mlx.core as mx
import numpy as np
import pytest
from torch_files import FOLDER, WEIGHTS, changed, members, pack, pickled

SHARED = Path(__file__).parents[2] / "shared" / "reference"
ONES = np.arange(100, dtype=np.float32).tobytes()


def values_of(path: Path, part: str | None = "model_state_dict") -> dict[str, np.ndarray]:
    state = torch_file.read(path)
    tensors = torch_file.tensors(path, state if part is None else state[part])
    return {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in tensors.items()}


def check(path: Path) -> None:
    """The file holds `WEIGHTS`; if PyTorch is installed, it must read the same."""
    found = values_of(path)
    assert list(found) == list(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert found[name].shape == expected.shape and np.array_equal(found[name], expected), name


def error_of(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        values_of(path, None if "weight" in path.name else "model_state_dict")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


# Files of PyTorch and other programs.


@pytest.mark.parametrize("name", ["plain.pt", "old.pt", "unsummed.pt"])
def test_files_of_pytorch(name: str) -> None:
    check(FOLDER / name)
    state = torch_file.read(FOLDER / name)
    kinds = {name: tensor.dtype for name, tensor in state["model_state_dict"].items()}
    assert (kinds["half"], kinds["bfloat"], kinds["matrix"]) == ("float16", "bfloat16", "float32")
    assert state["iterations"] == 1000
    assert state["optim_state_dict"]["param_groups"] == [{"betas": (0.9, 0.99)}]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wide", [True, False])
def test_repacked_files(tmp_path: Path, method: int, wide: bool) -> None:
    """Rewritten by another program, without the padding that PyTorch derives offsets from."""
    path = pack(tmp_path / "c.pt", members(), method, wide=wide)
    check(path)
    check_with_torch(path)


def test_files_packed_in_another_order(tmp_path: Path) -> None:
    contents = dict(reversed(members().items()))
    check(pack(tmp_path / "c.pt", contents, folder="elsewhere"))
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:  # as `zip -r` does, with the folders
        archive.mkdir("a")
        archive.mkdir("a/data")
        for name, content in contents.items():
            archive.writestr(f"a/{name}", content)
    check(tmp_path / "d.pt")
    check_with_torch(tmp_path / "d.pt")


def test_records_that_pytorch_may_omit(tmp_path: Path) -> None:
    names = (".format_version", ".storage_alignment", "byteorder", ".data/serialization_id")
    check(pack(tmp_path / "c.pt", {name: data for name, data in members().items() if name not in names}))


def test_a_wrong_alignment_moves_nothing(tmp_path: Path) -> None:
    check(pack(tmp_path / "c.pt", members() | {".storage_alignment": b"4096"}))


def check_with_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name, value in torch.load(path, weights_only=False)["model_state_dict"].items():
        assert np.array_equal(value.detach().float().numpy(), WEIGHTS[name])


def test_big_endian_values_are_byte_swapped(tmp_path: Path) -> None:
    path = pack(tmp_path / "c.pt", members() | {"byteorder": b"big"})
    found = values_of(path)
    assert found["matrix"].tobytes() == WEIGHTS["matrix"].byteswap().tobytes()
    torch = pytest.importorskip("torch")
    for name, value in torch.load(path, weights_only=False)["model_state_dict"].items():
        assert np.array_equal(value.detach().float().numpy(), found[name], equal_nan=True), name


@pytest.mark.parametrize("name", ["shakespeare-corenet.pt", "shakespeare-corenet-lora.pt"])
@pytest.mark.parametrize("method", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_reference_files_are_read_as_by_pytorch(tmp_path: Path, name: str, method: int | None) -> None:
    torch = pytest.importorskip("torch")
    if not SHARED.exists():
        pytest.skip("needs the reference checkpoint")
    path = SHARED / name if method is None else pack(tmp_path / "c.pt", members(SHARED / name), method)
    expected = torch.load(SHARED / name, weights_only=True)
    found = values_of(path, None)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name].float().numpy()) for name in expected)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize")
def test_values_equal_those_loaded_by_pytorch(tmp_path: Path) -> None:
    """Odd tensors in one file: those that are not plain arrays are refused by name, the others are right."""
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6, 8)
    attributed = torch.randn(3)
    attributed.note = "kept"
    state = {
        "permuted": base.permute(2, 0, 1),
        "cut": base[1:3, ::2, 3:],
        "one_long": base[:, :1].transpose(0, 1),
        "row": base[2],
        "attributed": attributed,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "number": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
    }
    odd = {
        "expanded": (torch.randn(1, 4).expand(3, 4), "repeats its values"),
        "windows": (torch.arange(9.0).unfold(0, 3, 1), "repeats its values"),
        "meta": (torch.empty(3, device="meta"), "on the meta device"),
        "sparse": (torch.eye(3).to_sparse(), "a sparse tensor"),
        "rows": (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        "quantized": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        "negated": (torch._neg_view(torch.ones(3)), "negated"),
        "double": (torch.zeros(3, dtype=torch.float64), "as float64"),
        "integer": (torch.zeros(3, dtype=torch.int64), "as int64"),
        "small": (torch.zeros(3).to(torch.float8_e4m3fn), "as float8_e4m3fn"),
        "complex": (torch.zeros(3, dtype=torch.complex64), "as complex64"),
        "bool": (torch.zeros(3, dtype=torch.bool), "as bool"),
    }
    for old in (False, True):
        path = tmp_path / "c.pt"
        torch.save(state, path, _use_new_zipfile_serialization=not old)
        expected = torch.load(path, weights_only=True)
        found = values_of(path, None)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert np.array_equal(found[name], value.detach().numpy()), name
        for name, (value, words) in odd.items():
            path = tmp_path / f"weight-{name}.pt"
            torch.save(state | {name: value}, path, _use_new_zipfile_serialization=not old)
            assert f"stores {name} as" in error_of(path) and words in error_of(path)


@pytest.mark.parametrize("old", [False, True])
def test_training_checkpoints(tmp_path: Path, old: bool) -> None:
    """With an optimizer, schedules, random states, dtypes and devices beside the weights."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model_state_dict": model.state_dict(),
        "optim": optimizer.state_dict(),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "random": torch.get_rng_state(),
        "more": [
            torch.float16,
            torch.device("cpu"),
            torch.Size([1]),
            {3},
            1j,
            2**70,
            None,
            True,
            "ü",
            b"x",
            bytearray(2),
        ],
    }
    path = tmp_path / "c.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    expected = torch.load(path, weights_only=True)["model_state_dict"]
    found = values_of(path)
    assert list(found) == ["weight", "bias"]
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in found)
    read = torch_file.read(path)
    assert read["schedule"]["milestones"] == {3: 1, 5: 1}
    assert read["more"][5:9] == [2**70, None, True, "ü"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "c.pt"
    for old in (False, True):
        torch.save(
            {"a": torch.ones(3), "x": {1, 2}}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old
        )
        state = torch_file.read(path)
        assert torch_file.tensors(path, {"a": state["a"]})["a"].read().tolist() == [1, 1, 1]


# Damage.


def test_an_incomplete_storage_is_refused(tmp_path: Path) -> None:
    """Truncated, empty or missing: PyTorch would read past its end."""
    plain = members()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        cut = pack(tmp_path / "cut.pt", plain | {"data/0": plain["data/0"][:-1]}, method)
        assert "the storage '0' of matrix is cut off" in error_of(cut)
        long = pack(tmp_path / "long.pt", plain | {"data/0": plain["data/0"] + b"1234"}, method)
        assert "of matrix is too long" in error_of(long)
        assert "of matrix is cut off" in error_of(pack(tmp_path / "empty.pt", plain | {"data/0": b""}, method))
        left = {name: data for name, data in plain.items() if name != "data/3"}
        assert "of first is missing" in error_of(pack(tmp_path / "missing.pt", left, method))


def test_values_that_do_not_match_their_checksum_are_refused(tmp_path: Path) -> None:
    def flip(data: bytearray) -> None:
        data[data.index(WEIGHTS["matrix"].tobytes()) + 5] ^= 1

    path = changed(tmp_path / "c.pt", flip)
    assert "matrix does not match its size or checksum" in error_of(path)
    tensors = torch_file.tensors(path, torch_file.read(path)["model_state_dict"])
    assert tensors["parameter"].read().tolist() == [[0.5] * 4] * 3

    def flip_flat(data: bytearray) -> None:
        data[data.index(np.arange(40, dtype=np.float32).tobytes()) + 39 * 4] ^= 1

    path = changed(tmp_path / "d.pt", flip_flat)
    assert "first does not match its size or checksum" in error_of(path)  # whose own values are intact

    def flip_pickle(data: bytearray) -> None:
        data[data.index(b"iterations")] ^= 1

    assert "data.pkl does not match its size or checksum" in error_of(changed(tmp_path / "e.pt", flip_pickle))


def test_contradictory_archive_members_are_refused(tmp_path: Path) -> None:
    def rename_header(data: bytearray) -> None:
        data[data.index(b"plain/data/1")] ^= 1

    def set_directory(key: bytes, at: int, value: bytes) -> Callable[[bytearray], None]:
        def change(data: bytearray) -> None:
            entry = data.rindex(b"plain/" + key) - 46
            data[entry + at : entry + at + len(value)] = value

        return change

    def encrypt(data: bytearray) -> None:
        data[data.rindex(b"plain/data/0") - 46 + 8] |= 1

    def spoil_alignment(data: bytearray) -> None:
        start = data.index(b"plain/.storage_alignment")
        data[data.index(b"64", start)] ^= 8

    def set_length(data: bytearray) -> None:
        data[-10:-6] = (2**31 - 1).to_bytes(4, "little")

    first = zipfile.ZipFile(FOLDER / "plain.pt").getinfo("plain/data/0").header_offset
    cases = {
        "not at its offset in the zip directory": rename_header,
        "compressed in a way that PyTorch cannot read": set_directory(b"data/0", 10, b"\x0c\x00"),
        "overlaps another member": set_directory(b"data/1", 42, struct.pack("<I", first + 4)),
        "contradictory sizes": set_directory(b"data/1", 24, struct.pack("<I", 40)),
        "is encrypted": encrypt,
        "is not a regular file in this archive": set_directory(b"data/2", 38, b"\x10"),
        ".storage_alignment does not match its size or checksum": spoil_alignment,
    }
    for words, change in cases.items():
        assert words in error_of(changed(tmp_path / "c.pt", change)), words
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert "compressed in a way that PyTorch" in error_of(pack(tmp_path / "c.pt", members(), method))
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name, content in members().items():
            archive.writestr(f"a/{name}", content)
        archive.writestr("a/data/0", bytes(140))
    assert "twice" in error_of(tmp_path / "c.pt")
    long = changed(tmp_path / "d.pt", set_length, pack(tmp_path / "c.pt", members()))
    assert "directory is missing or too long" in error_of(long)
    assert "has no data.pkl" in error_of(pack(tmp_path / "c.pt", {"x": b""}))
    assert "its byte order is b'middle'" in error_of(pack(tmp_path / "c.pt", members() | {"byteorder": b"middle"}))
    assert "TorchScript" in error_of(pack(tmp_path / "c.pt", members() | {"constants.pkl": b""}))


def test_contradictory_old_files_are_refused(tmp_path: Path) -> None:
    data = (FOLDER / "old.pt").read_bytes()
    place = data.index(WEIGHTS["matrix"].tobytes()) - 8
    assert data[place : place + 8] == (35).to_bytes(8, "little")
    path = tmp_path / "c.pt"
    path.write_bytes(data[:place] + (34).to_bytes(8, "little") + data[place + 8 :])
    assert "has contradictory sizes" in error_of(path)
    for end in (place + 4, place + 30, len(data) - 1):
        path.write_bytes(data[:end])
        assert "is damaged" in error_of(path)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "is a tar archive" in error_of(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": 1}, "weight is larger than its storage"),
        ({"shape": (11, 10)}, "weight is larger than its storage"),
        ({"strides": (11, 1)}, "weight is larger than its storage"),
        ({"strides": (2**61, 1)}, "weight is larger than its storage"),
        ({"size": 101}, "is cut off"),
        ({"size": 2**60}, "is cut off"),
        ({"kind": "BFloat16Storage", "size": 201}, "is cut off"),
        ({"shape": (2**40, 2**40)}, "has shape"),
        ({"shape": (0, 2**40)}, "has shape"),
        ({"strides": (0, 1)}, "as a view that repeats its values"),
        ({"shape": (2**30, 2**30), "strides": (0, 0)}, "as a view that repeats its values"),
        ({"strides": (5, 1)}, "as a view that repeats its values"),
        ({"strides": (1, 1)}, "as a view that repeats its values"),
        ({"offset": -1}, "invalid size, stride or offset"),
        ({"shape": (-1, 10)}, "invalid size, stride or offset"),
        ({"size": -100}, "invalid size, stride or offset"),
        ({"shape": (100,)}, "not one stride for each"),
        ({"location": "meta"}, "stores weight as a tensor on the meta device"),
        ({"kind": "DoubleStorage", "size": 50, "shape": (5, 10)}, "stores weight as float64"),
        ({"kind": "OtherStorage"}, "names torch.OtherStorage"),
        ({"rebuild": "_rebuild_qtensor"}, "stores weight as a quantized tensor"),
        ({"rebuild": "_import_dotted_name"}, "names torch._utils._import_dotted_name"),
    ],
)
def test_tensors_outside_of_their_file_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "weight.pt"
    pack(path, {"data.pkl": pickled(), "data/0": ONES})
    assert np.array_equal(values_of(path, None)["weight"].reshape(-1), np.arange(100))
    pack(path, {"data.pkl": pickled(**changes), "data/0": ONES})
    assert words in error_of(path)


def test_a_file_removed_while_it_is_read_is_reported(tmp_path: Path) -> None:
    path = changed(tmp_path / "c.pt", lambda data: None)
    tensors = torch_file.tensors(path, torch_file.read(path)["model_state_dict"])
    os.truncate(path, 2000)
    with pytest.raises(RequestError, match="was changed while it was being read"):
        tensors["rest"].read()
    path.unlink()
    with pytest.raises(RuntimeError, match="No such file"):
        tensors["matrix"].read()


def test_paths_that_are_not_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, words in {"pipe.pt": "a pipe", "folder.pt": "a folder", "absent.pt": "does not exist"}.items():
        with pytest.raises(RequestError, match=words):
            torch_file.read(tmp_path / name)


def repacked(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members().items():
            archive.writestr(f"plain/{name}", content)
    return file.getvalue()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Truncated, shifted, or with bytes changed anywhere, including the directory and member headers."""
    changed = bytearray(data)
    archive = zipfile.ZipFile(io.BytesIO(data))
    kind, at = draw.randrange(5), draw.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.choice([0, 1, 64])) + data[at + draw.choice([0, 1, 64]) :]
    if kind == 2:
        spans = [(0, len(data))]
    elif kind == 3:
        spans = [(archive.start_dir, len(data))]
    else:
        spans = [(member.header_offset, member.header_offset + 60) for member in archive.infolist()]
    for _ in range(draw.choice([1, 1, 2])):
        changed[draw.randrange(*draw.choice(spans))] = draw.choice([0, 1, 255, draw.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("count", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_never_changes_values(tmp_path: Path, count: int) -> None:
    """Randomly damaged files: each is refused, or still gives the same values."""
    draw = random.Random(0)
    sources = [(FOLDER / "plain.pt").read_bytes(), repacked(zipfile.ZIP_STORED), repacked(zipfile.ZIP_DEFLATED)]
    path, right = tmp_path / "c.pt", 0
    for _ in range(count):
        path.write_bytes(mutated(draw.choice(sources), draw))
        try:
            found = values_of(path)
        except RequestError:
            continue
        right += 1
        assert all(np.array_equal(found[name], value) for name, value in WEIGHTS.items())
    assert count / 10 < right < count * 4 / 5


@pytest.mark.parametrize("count", [80, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_pickles_end_in_an_error_or_a_tensor_of_the_file(tmp_path: Path, count: int) -> None:
    """Pickles with changed bytes and matching checksums."""
    draw = random.Random(1)
    good, path = members(), tmp_path / "c.pt"
    refused = 0
    for _ in range(count):
        data = bytearray(good["data.pkl"])
        for _ in range(draw.choice([1, 1, 3])):
            data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 255, draw.randrange(256)])
        pack(path, good | {"data.pkl": bytes(data)})
        try:
            state = torch_file.read(path)
            found = {}
            if isinstance(state, dict) and isinstance(state.get("model_state_dict"), dict):
                weights = state["model_state_dict"].items()
                found = torch_file.tensors(path, {k: v for k, v in weights if isinstance(v, StoredTensor)})
        except RequestError:
            refused += 1
            continue
        for tensor in found.values():
            assert tensor.read().shape == tensor.shape
    assert count / 4 < refused < count


# Hostile files.


HOSTILE = {
    "bytes": b"cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R.",
    "place": b"}r\xff\xff\xff\xff.",
    "text": b"X\xff\xff\xff\x7fabc.",
    "long text": b"\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "array": b"\x96" + (2**40).to_bytes(8, "little") + b".",
    "number": b"I" + b"9" * 5000 + b"\n.",
    "key": b"}" + b")" + b"\x85" * 200_000 + b"Ns.",
    "tuples": b")" + b"\x85" * 200_000 + b".",
    "marks": b"(" * 200_000 + b".",
    "calls": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00h\x00h\x00h\x00" + b"h\x00)N\x87" * 9 + b"tR.",
    "copies of pairs": b"ccollections\nOrderedDict\nq\x00](K\x01K\x02\x86q\x01"
    + b"h\x01" * 50_000
    + b"e\x85q\x02"
    + b"h\x00h\x02R" * 50_000
    + b".",
    "copies of dictionaries": b"ccollections\nCounter\nq\x00}("
    + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(65536))
    + b"u\x85q\x01"
    + b"h\x00h\x01R" * 20_000
    + b".",
    "long keys": b"\x8b" + struct.pack("<i", 8_000_000) + b"\x7f" * 8_000_000 + b"q\x00}" + b"h\x00Ns" * 100_000 + b".",
    "dimensions": b"("
    + b"K\x01" * 100_000
    + b"tq\x01(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQq\x05"
    + b"ctorch._utils\n_rebuild_tensor\nq\x06"
    + b"h\x06(h\x05K\x00h\x01h\x01tR" * 90_000
    + b".",
    "attributes": b"ccollections\nOrderedDict\nN}b.",
}


@pytest.mark.parametrize("steps", [250_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_hostile_files_are_refused_cheaply(tmp_path: Path, steps: int) -> None:
    """Read in a separate process with a limit on its memory; by default a pickle may have a quarter of the steps."""
    assert torch_pickle._MAX_STEPS == 1_000_000
    for name, code in (HOSTILE | {"dictionaries": b"}" * (steps + 100_000) + b"."}).items():
        pack(tmp_path / f"{name}.pt", {"data.pkl": b"\x80\x02" + code})
    pack(tmp_path / "zeros.pt", {"data.pkl": b"}" * 20_000_000}, zipfile.ZIP_DEFLATED)
    lying = pack(tmp_path / "lying.pt", {"data.pkl": bytes(20_000_000)}, zipfile.ZIP_DEFLATED)
    with lying.open("r+b") as file:
        file.seek(zipfile.ZipFile(lying).start_dir + 24)
        file.write(struct.pack("<I", 1000))
    with zipfile.ZipFile(tmp_path / "members.pt", "w") as archive:
        for number in range(10_000):
            archive.writestr(str(number), b"")
    code = f"""
import resource, sys, time
from pathlib import Path
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import torch_file, torch_pickle
torch_pickle._MAX_STEPS = {steps}
unit = 1 if sys.platform == "darwin" else 1024
for path in sorted(Path({str(tmp_path)!r}).glob("*.pt")):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, time.perf_counter()
    try:
        torch_file.read(path)
    except RequestError:
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    print(path.name, int(grown < 200_000_000), int(time.perf_counter() - start < 30), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE) + 4 and all(line.endswith(" 1 1") for line in lines), lines


def test_a_storage_much_larger_than_its_compressed_file_is_refused(tmp_path: Path) -> None:
    size = 17_000_000  # 68 MB, a little more than may come from a small file
    pkl = pickled(size=size, shape=(size,), strides=(1,))
    path = pack(tmp_path / "weight.pt", {"data.pkl": pkl, "data/0": bytes(4 * size)}, zipfile.ZIP_DEFLATED)
    assert "many times as large as the file" in error_of(path)


class Hostile:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_globals_other_than_tensors_are_named(tmp_path: Path, protocol: int) -> None:
    path = pack(tmp_path / "c.pt", {"data.pkl": pickle.dumps({"a": Hostile()}, protocol)})
    assert "is refused: it names posix.getcwd" in error_of(path)
    path.write_bytes(pickle.dumps(Hostile(), protocol))
    assert "is refused: it names posix.getcwd" in error_of(path)
