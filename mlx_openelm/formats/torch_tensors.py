"""Tensors as a PyTorch pickle describes them, and the functions it may call to build them.

Like `torch.load(weights_only=True)`, a pickle may name only what is listed here. A call that builds a tensor gives its
description, any other call a placeholder; nothing is imported or run, and no tensor is allocated.
Source: torch/_weights_only_unpickler.py and torch/_utils.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# PyTorch's names of types, and their sizes in bytes, by the class of their storage.
STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("uint8", 1),
}
META = "a tensor on the meta device, which has no values"
# Functions that build tensors which are not plain arrays.
_NOT_PLAIN = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": META,
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another kind of device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another kind of device",
}
_PARAMETERS = (
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
DICTIONARIES = ("collections.OrderedDict", "collections.Counter")
# Everything a pickle may name: besides tensors, NumPy numbers (a best metric), devices, sets and similar.
_KNOWN = {
    *_NOT_PLAIN,
    *_PARAMETERS,
    *DICTIONARIES,
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    _FROM_TYPE,
    "torch.serialization._get_layout",
    "torch.Tensor",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
    "builtins.bytearray",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    *(f"torch.per_{kind}" for kind in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
    "torch.per_channel_affine_float_qparams",
    *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in STORAGES),
}
_DTYPE = re.compile(r"bool|bfloat16|float\d+\w*|complex\d+|q?u?int\d+\w*")  # `torch.float32` and so on
MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 64


class DamagedPickle(Exception):
    """Not a checkpoint's pickle, or an inconsistent one."""


class ForbiddenGlobal(Exception):
    """The pickle asks for something that could run code; the message is its name."""


@dataclass(frozen=True)
class Storage:
    """A run of values in the file; tensors are views of it."""

    key: str
    dtype: str  # PyTorch's name
    itemsize: int
    size: int  # in values

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as PyTorch describes it: offset and strides count values of its storage.

    For other kinds (sparse, quantized) the size is 0 and `dtype` names the kind.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """The number of the storage's values from the tensor's first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie row by row without gaps."""
        sides = [(n, stride) for n, stride in zip(self.shape, self.strides, strict=True) if n != 1]
        return 0 in self.shape or all(
            stride == math.prod(n for n, _ in sides[i + 1 :]) for i, (_, stride) in enumerate(sides)
        )

    @property
    def repeats(self) -> bool:
        """Whether two of its values may overlap in memory: strides of zero, overlapping windows."""
        reach = 0
        for stride, n in sorted(zip(self.strides, self.shape, strict=True)):
            if n > 1 and stride <= reach:
                return True
            reach += (n - 1) * stride
        return False


@dataclass(frozen=True)
class Global:
    """A function or class that the pickle names."""

    name: str


class Placeholder:
    """Stands for a value that is not needed."""


PLACEHOLDER = Placeholder()


def not_plain(kind: str) -> StoredTensor:
    """The description of a tensor that is not a plain array; `kind` names it in messages."""
    return StoredTensor(Storage("", kind, 1, 0), kind, 0, (), ())


def find(module: str, qualified: str) -> Global:
    """The function or class that a pickle names.

    Raises:
        ForbiddenGlobal: it is not allowed.
    """
    name = f"{'builtins' if module == '__builtin__' else module}.{qualified}"  # Python 2's name of the module
    is_dtype = module == "torch" and _DTYPE.fullmatch(qualified)
    if name in _KNOWN or is_dtype or (module == "numpy.dtypes" and qualified.isidentifier()):
        return Global(name)
    raise ForbiddenGlobal(name)


def call(function: Global, arguments: Any) -> Any:
    """The result of calling an allowed function.

    Raises:
        DamagedPickle: the arguments are wrong for the function.
    """
    name = function.name
    if not isinstance(arguments, tuple):
        raise DamagedPickle("it calls a function without arguments")
    if name in _PARAMETERS:
        return arguments[0]
    if name in _NOT_PLAIN:
        return not_plain(_NOT_PLAIN[name])
    if name == _FROM_TYPE:  # a tensor with attributes of its own
        build, _, values, _ = arguments
        # PyTorch never nests such calls; a small file that does could recurse too deeply.
        return PLACEHOLDER if build.name == _FROM_TYPE else call(build, values)
    if name.startswith("torch._utils._rebuild_tensor"):
        return _rebuild(*arguments)
    return PLACEHOLDER


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> Any:
    """The tensor that `_rebuild_tensor` builds, or its later versions.

    Args:
        rest: requires_grad and hooks; with `_v3`, then the type; last, flags such as whether it is conjugated.
    """
    if isinstance(storage, StoredTensor):
        return storage
    if not isinstance(storage, Storage) or not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise DamagedPickle("it has a tensor without a storage")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise DamagedPickle("it has a tensor with too many dimensions, or not one stride for each")
    dtype = storage.dtype
    for part in rest[2:]:
        if isinstance(part, Global):
            dtype = part.name.removeprefix("torch.")
        elif part:
            return not_plain("a conjugated or negated tensor")
    return StoredTensor(storage, dtype, whole_numbers([offset])[0], whole_numbers(shape), whole_numbers(strides))


def whole_numbers(values: Sequence[Any]) -> tuple[int, ...]:
    """Sizes, strides or offsets; DamagedPickle if one is not a whole number from 0 to `MAX_NUMBER`."""
    if not all(type(value) is int and 0 <= value <= MAX_NUMBER for value in values):
        raise DamagedPickle("it has an invalid size, stride or offset")
    return tuple(values)
