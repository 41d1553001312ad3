"""Reading a PyTorch checkpoint's pickle as data: nothing in it is run, and no tensor is allocated.

A pickle is a program for a small stack machine. This one knows the instructions that state dictionaries use, and
a short list of functions they may call, like `torch.load(weights_only=True)`: a call that builds a tensor becomes its
description, other harmless calls a placeholder. The number of steps is bounded, so a hostile file costs little.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
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
# Tensors that are not plain arrays.
_ODD = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device's kind",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's kind",
}
_PARAMETERS = (
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_DICTIONARIES = ("collections.OrderedDict", "collections.Counter")
# Everything a pickle may name: besides tensors, NumPy numbers (a best metric), devices, sets and similar.
_KNOWN = {
    *_ODD,
    *_PARAMETERS,
    *_DICTIONARIES,
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
_TYPE = re.compile(r"bool|bfloat16|float\d+\w*|complex\d+|q?u?int\d+\w*")

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A checkpoint with training state takes about 50,000 steps; the limit also bounds what a file can allocate.
_MAX_STEPS = 1_000_000
_MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 64


class DamagedPickle(Exception):
    """Not a checkpoint's pickle, or an inconsistent one."""


class ForbiddenGlobal(Exception):
    """The pickle asks for something that could run code; the message is its name."""


@dataclass(frozen=True)
class Storage:
    """A run of values in the file, which tensors are views of."""

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

    One that is not a plain array has no size, and in place of a type the kind of tensor it is.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many values of the storage it reaches over, from its first to its last."""
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
        """Whether two of its values may lie in one place: strides of zero, windows that overlap."""
        reach = 0
        for stride, n in sorted(zip(self.strides, self.shape, strict=True)):
            if n > 1 and stride <= reach:
                return True
            reach += (n - 1) * stride
        return False


@dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names."""

    name: str


class _Other:
    """A placeholder for values that are not needed."""


_OTHER = _Other()


def load(file: BytesIO) -> tuple[Any, dict[str, Storage]]:
    """The next pickle in `file`, which is left at its end, and the storages it refers to by their keys.

    Dictionaries, lists, tuples, numbers and text come as they are, tensors as `StoredTensor`.

    Raises:
        DamagedPickle: the data is not such a pickle.
        ForbiddenGlobal: it asks for more than tensors and plain data.
    """
    try:
        return _Machine().run(file)
    # What ends before it should, misses an operand, or has one of the wrong kind.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedPickle(str(error)) from None


def _odd(kind: str) -> StoredTensor:
    return StoredTensor(Storage("", kind, 1, 0), kind, 0, (), ())


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps = 0

    def run(self, file: BytesIO) -> tuple[Any, dict[str, Storage]]:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop(), self.storages
            self._count(1)
            self._step(opcode.name, argument)
        raise DamagedPickle("it does not end")

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise DamagedPickle("it has too many instructions")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            start = len(stack) - _TUPLES[name]
            stack[start:] = [tuple(_at(stack, start))]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("SETITEMS", "APPENDS", "TUPLE", "DICT", "LIST", "ADDITEMS", "FROZENSET"):
            self._take_marked(name)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "APPEND":
            value = stack.pop()
            _extend(stack[-1], [value])
        elif name == "EMPTY_SET":
            stack.append(_OTHER)
        elif name == "GLOBAL":
            stack.append(_find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            qualified, module = stack.pop(), stack.pop()
            stack.append(_find(module, qualified))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if function.name in _DICTIONARIES:
                stack.append(self._dictionary(*arguments))
            else:
                stack.append(_call(function, arguments))
        elif name == "BUILD":  # attributes, which are not values
            stack.pop()
            if not isinstance(stack[-1], dict | _Other):
                raise DamagedPickle("it sets the attributes of what has none")
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise DamagedPickle(f"it has the instruction {name}")

    def _take_marked(self, name: str) -> None:
        items, self.stack = self.stack, self.marked.pop()
        if name == "SETITEMS":
            _set_items(self.stack[-1], items)
        elif name == "APPENDS":
            _extend(self.stack[-1], items)
        elif name == "TUPLE":
            self.stack.append(tuple(items))
        elif name == "DICT":
            self.stack.append(_set_items({}, items))
        elif name == "LIST":
            self.stack.append(items)
        elif name == "FROZENSET":
            self.stack.append(_OTHER)

    def _dictionary(self, values: Any = ()) -> Any:
        """A dictionary of pairs, as Python 2 wrote them, or made from another, which is as good as that one."""
        if isinstance(values, dict) and values:
            return values
        self._count(len(values))
        return _set_items({}, [part for key, value in values for part in (key, value)])

    def _storage(self, what: str, kind: _Global, key: str, location: str, size: int, view: Any = None) -> Any:
        """The storage that a tensor is a view of; old files have `view`, a part of one, which PyTorch left off."""
        if what != "storage" or view is not None or not isinstance(key, str):
            raise DamagedPickle("it has something else where a storage belongs")
        if location == "meta":
            return _odd("a tensor on the meta device, which has no values")
        dtype, itemsize = STORAGES[kind.name.rpartition(".")[2]]
        storage = Storage(key, dtype, itemsize, _numbers([size])[0])
        if self.storages.setdefault(key, storage) != storage:
            raise DamagedPickle(f"it describes the storage {key} in two ways")
        return storage


def _at(stack: list[Any], start: int) -> list[Any]:
    if start < 0:
        raise IndexError("the stack is empty")
    return stack[start:]


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise DamagedPickle("it appends to something that is not a list")
    target.extend(items)


def _set_items(target: Any, items: list[Any]) -> Any:
    if not isinstance(target, dict) or len(items) % 2:
        raise DamagedPickle("it sets items of something that is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Of plain kinds: the hash of a tuple in a tuple, and so on, overflows Python's own stack, and that of a
        # number with millions of digits takes its time.
        if not all(map(_is_plain, key if isinstance(key, tuple) else (key,))):
            raise DamagedPickle("it has a dictionary whose keys are neither names nor numbers")
        target[key] = value
    return target


def _is_plain(key: Any) -> bool:
    if isinstance(key, int):
        return abs(key) <= _MAX_NUMBER
    return isinstance(key, str | float | bytes | None)


def _find(module: str, qualified: str) -> _Global:
    name = f"{'builtins' if module == '__builtin__' else module}.{qualified}"  # as Python 2 called it
    is_type = module == "torch" and _TYPE.fullmatch(qualified)
    if name in _KNOWN or is_type or (module == "numpy.dtypes" and qualified.isidentifier()):
        return _Global(name)
    raise ForbiddenGlobal(name)


def _call(function: _Global, arguments: Any) -> Any:
    """What a function of the list gives."""
    name = function.name
    if not isinstance(arguments, tuple):
        raise DamagedPickle("it calls a function without arguments")
    if name in _PARAMETERS:
        return arguments[0]
    if name in _ODD:
        return _odd(_ODD[name])
    if name == _FROM_TYPE:  # a tensor with attributes of its own
        build, _, values, _ = arguments
        return _OTHER if build.name == _FROM_TYPE else _call(build, values)
    if name.startswith("torch._utils._rebuild_tensor"):
        return _rebuild(*arguments)
    return _OTHER


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> Any:
    """`rest` is nothing, or whether it needs gradients, hooks, a type of its own (`_rebuild_tensor_v3`), and flags."""
    if isinstance(storage, StoredTensor):
        return storage
    if not isinstance(storage, Storage) or not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise DamagedPickle("it has a tensor without a storage")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise DamagedPickle("it has a tensor with more or fewer strides than sizes, or too many")
    dtype = storage.dtype
    for part in rest[2:]:
        if isinstance(part, _Global):
            dtype = part.name.removeprefix("torch.")
        elif part:
            return _odd("a conjugated or negated tensor")
    return StoredTensor(storage, dtype, _numbers([offset])[0], _numbers(shape), _numbers(strides))


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value <= _MAX_NUMBER for value in values):
        raise DamagedPickle("it has a size, stride or offset that cannot be one")
    return tuple(values)
