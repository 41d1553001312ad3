"""Shared by the adapter formats: tensors by name, of which `take` checks presence and shape, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from ..config import EMBEDDING, ModelConfig
from ..errors import RequestError
from ..inputs import check_file
from . import safetensors

# The largest scale and dropout that are accepted: beyond float32's range the changes are infinite.
MAX_FLOAT32 = 3.4e38


class Tensors:
    """The tensors of one file, each taken out once; those left at the end are unexpected (`check_empty`)."""

    def __init__(self, file: Path, tensors: Mapping[str, mx.array]):
        self.file = file
        self._left = dict(tensors)

    @classmethod
    def read(cls, file: Path, rename: Callable[[str], str] = str) -> Tensors:
        """The tensors of a safetensors file, unread.

        Args:
            rename: maps a name in the file to the standard name.

        Raises:
            RequestError: a file is missing or damaged, has a tensor twice, or a tensor that is not floating-point.
        """
        check_file(file)
        stored = safetensors.read_tensors([file])
        for name, tensor in stored.items():
            if not mx.issubdtype(tensor.dtype, mx.floating):
                kind = str(tensor.dtype).removeprefix("mlx.core.")
                raise RequestError(f"{file} stores {name} as {kind}; adapters hold floating-point numbers.")
        tensors: dict[str, mx.array] = {}
        for name, tensor in stored.items():
            usual = rename(name)
            if usual in tensors:
                raise RequestError(f"{file} contains {usual} under two names; a file may hold only one adapter.")
            tensors[usual] = tensor.read()
        return cls(file, tensors)

    def names(self) -> list[str]:
        """The names of the tensors that are left."""
        return list(self._left)

    def paths(self, suffixes: Iterable[str]) -> list[str]:
        """The distinct prefixes of names with these suffixes."""
        suffixes = tuple(suffixes)
        paths = (name.removesuffix(suffix) for name in self._left for suffix in suffixes if name.endswith(suffix))
        return list(dict.fromkeys(paths))

    def take(self, name: str, shape: tuple[int | None, ...]) -> mx.array:
        """The tensor of that name, in float32; None in a shape stands for any size but 0.

        Raises:
            RequestError: it is not there, or has another shape.
        """
        tensor = self.take_stored(name)
        fits = len(tensor.shape) == len(shape) and all(
            n == expected or (expected is None and n > 0) for n, expected in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            expected = ", ".join("rank" if n is None else str(n) for n in shape)
            raise RequestError(
                f"{self.file} does not match the model: {name} has shape {list(tensor.shape)} instead of [{expected}]; "
                "the adapter was made for another model."
            )
        return tensor.astype(mx.float32)

    def take_stored(self, name: str) -> mx.array:
        """The tensor of that name, in the type and shape it is stored in; RequestError if it is not there."""
        if name not in self._left:
            raise RequestError(f"{self.file} is incomplete: the adapter's {name} is missing.")
        return self._left.pop(name)

    def discard(self, *, prefix: str = "", suffix: str = "") -> None:
        """Drop the tensors whose names have this prefix and this suffix."""
        self._left = {
            name: tensor
            for name, tensor in self._left.items()
            if not (name.startswith(prefix) and name.endswith(suffix))
        }

    def take_whole(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
        """Those of the named tensors that are in the file, as stored; errors as `take`."""
        tensors = {name: self._left[name] for name in shapes if name in self._left}
        for name in tensors:
            self.take(name, shapes[name])
        return tensors

    def take_if_there(self, name: str, shape: tuple[int | None, ...]) -> mx.array | None:
        """As `take`, but None if the file has no such tensor."""
        return self.take(name, shape) if name in self._left else None

    def check_empty(self, what: str) -> None:
        """Raises RequestError if a tensor is left, since `what` has no place for it."""
        if self._left:
            names = list(self._left)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise RequestError(f"{self.file} contains {names[0]}{more}, which {what} has no place for.")


def sides(file: Path, path: str, config: ModelConfig) -> tuple[int, int]:
    """The input and output size of a module; the embedding's input size is the vocabulary.

    Raises:
        RequestError: the model has no such module.
    """
    shape = config.matrix_shapes().get(path)
    if shape is None:
        raise RequestError(f"{file} changes {path}, which the model does not have or which is not a matrix.")
    return shape if path == EMBEDDING else (shape[1], shape[0])


def write(file: Path, tensors: Mapping[str, mx.array], kind: str) -> None:
    """Write a safetensors file with `kind` in its metadata: `mlx`, or `pt` for PyTorch."""
    mx.eval(list(tensors.values()))  # they may be read lazily from the file that is overwritten
    # Python reports a full disk; MLX's writer does not.
    with file.open("wb") as stream:
        mx.save_safetensors(stream, dict(tensors), {"format": kind})  # type: ignore[arg-type]
