"""PyTorch's checkpoint files without PyTorch: contents of those in `fixtures/torch`, archives, handmade pickles.

`plain.pt` and `old.pt` are `torch.save(state, path)` of PyTorch 2.13, the second with
`_use_new_zipfile_serialization=False`, `unsummed.pt` after `torch.serialization.set_crc32_options(False)`:

    flat = torch.arange(40.0)
    weights = OrderedDict(
        matrix=torch.arange(35.0).reshape(5, 7) / 8, parameter=torch.nn.Parameter(torch.full((3, 4), 0.5)),
        transposed=torch.arange(24.0).reshape(6, 4).t(), first=flat[:10], rest=flat[10:].reshape(5, 6),
        thirds=flat[::3], half=torch.arange(8.0).reshape(2, 2, 2).half(), bfloat=torch.arange(9.0).bfloat16(),
        scalar=torch.tensor(3.5))
    state = {"model_state_dict": weights, "best_metric": np.float64(2.5), "iterations": 1000,
             "optim_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}}
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "torch"
_FLAT = np.arange(40, dtype=np.float32)
WEIGHTS = {
    "matrix": np.arange(35, dtype=np.float32).reshape(5, 7) / 8,
    "parameter": np.full((3, 4), 0.5, np.float32),
    "transposed": np.arange(24, dtype=np.float32).reshape(6, 4).T,
    "first": _FLAT[:10],
    "rest": _FLAT[10:].reshape(5, 6),
    "thirds": _FLAT[::3],
    "half": np.arange(8, dtype=np.float16).reshape(2, 2, 2),
    "bfloat": np.arange(9, dtype=np.float32),
    "scalar": np.array(3.5, np.float32),
}


def members(path: Path = FOLDER / "plain.pt") -> dict[str, bytes]:
    """An archive's members by name below its folder, in order; checksums are not verified."""
    data = path.read_bytes()
    found = {}
    for member in zipfile.ZipFile(io.BytesIO(data)).infolist():
        start = member.header_offset
        start += 30 + sum(struct.unpack("<2H", data[start + 26 : start + 30]))
        found[member.filename.partition("/")[2]] = data[start : start + member.file_size]
    return found


def pack(
    path: Path,
    contents: dict[str, bytes],
    method: int = zipfile.ZIP_STORED,
    folder: str = "archive",
    wide: bool = False,
) -> Path:
    """Write an archive with Python's zipfile."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            with archive.open(f"{folder}/{name}", "w", force_zip64=wide) as member:
                member.write(content)
    return path


def changed(path: Path, change: Callable[[bytearray], None], source: Path = FOLDER / "plain.pt") -> Path:
    """Write a copy of a file with some of its bytes changed."""
    data = bytearray(source.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def pickled(
    *,
    rebuild: str = "_rebuild_tensor_v2",
    kind: str = "FloatStorage",
    location: str = "cpu",
    size: int = 100,
    offset: int = 0,
    shape: tuple[int, ...] = (10, 10),
    strides: tuple[int, ...] = (10, 1),
) -> bytes:
    """The pickle of a dictionary with one tensor, `weight`, whose values are in `data/0`."""
    tensor = _tensor("0", rebuild, kind, location, size, offset, shape, strides)
    return b"\x80\x02}" + _text("weight") + tensor + b"s."


def write_state(path: Path, weights: dict[str, np.ndarray], under: Sequence[str] = ()) -> Path:
    """Write float32 tensors by name as `torch.save` does; with `under`, in a dictionary that holds them by each key."""
    items, contents = b"", {"byteorder": b"little", "version": b"3\n"}
    for key, (name, weight) in enumerate(weights.items()):
        strides = tuple(stride // weight.itemsize for stride in weight.strides)
        place = str(key), "_rebuild_tensor_v2", "FloatStorage", "cpu", weight.size
        items += _text(name) + _tensor(*place, 0, weight.shape, strides) + b"s"
        contents[f"data/{key}"] = weight.astype("<f4").tobytes()
    state = b"}" + items
    if under:
        state = b"}" + b"".join(_text(key) + state + b"s" for key in under)
    return pack(path, {"data.pkl": b"\x80\x02" + state + b"."} | contents)


def _tensor(
    key: str, rebuild: str, kind: str, location: str, size: int, offset: int, shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> bytes:  # fmt: skip
    storage = b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text(location) + _numbers(size)
    sides = b"(" + _numbers(*shape) + b"t(" + _numbers(*strides) + b"t"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return f"ctorch._utils\n{rebuild}\n(".encode() + storage + b"tQ" + _numbers(offset) + sides + hooks + b"tR"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _numbers(*values: int) -> bytes:
    return b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values)
