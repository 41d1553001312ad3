"""Reading a PyTorch checkpoint's pickle as data: nothing in it is run, and no tensor is allocated.

A pickle is a program for a small stack machine (Python's `pickletools` describes its instructions). This one implements
those that state dictionaries use; the names and calls it allows are listed in `torch_tensors`. The number of steps is
limited, so a hostile file costs little.
"""

from __future__ import annotations

import pickletools
from io import BytesIO
from typing import Any

from .torch_tensors import (
    DICTIONARIES,
    MAX_NUMBER,
    META,
    PLACEHOLDER,
    STORAGES,
    DamagedPickle,
    Global,
    Placeholder,
    Storage,
    call,
    find,
    not_plain,
    whole_numbers,
)

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# A checkpoint with training state takes about 50,000 steps; the limit also bounds what a file can allocate.
_MAX_STEPS = 1_000_000


def load(file: BytesIO) -> tuple[Any, dict[str, Storage]]:
    """The next pickle in `file`, and the storages it refers to by their keys; `file` is left at the pickle's end.

    Dictionaries, lists, tuples, numbers and text are returned as they are, tensors as `StoredTensor`.

    Raises:
        DamagedPickle: the data is not such a pickle.
        ForbiddenGlobal: it asks for more than tensors and plain data.
    """
    try:
        return _Machine().run(file)
    # The pickle is truncated, or an operand is missing or of the wrong type.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedPickle(str(error)) from None


class _Machine:
    """The stack machine, without the instructions that import or call anything else."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps = 0

    def run(self, file: BytesIO) -> tuple[Any, dict[str, Storage]]:
        """The value that the program leaves, and its storages by key."""
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
            stack.append(PLACEHOLDER)
        elif name == "GLOBAL":
            stack.append(find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            qualified, module = stack.pop(), stack.pop()
            stack.append(find(module, qualified))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if function.name in DICTIONARIES:
                stack.append(self._dictionary(*arguments))
            else:
                stack.append(call(function, arguments))
        elif name == "BUILD":  # sets attributes, which are not needed
            stack.pop()
            if not isinstance(stack[-1], dict | Placeholder):
                raise DamagedPickle("it sets attributes of something that has none")
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise DamagedPickle(f"it has the instruction {name}")

    def _take_marked(self, name: str) -> None:
        """An instruction whose operands are everything above the last mark."""
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
            self.stack.append(PLACEHOLDER)

    def _dictionary(self, values: Any = ()) -> Any:
        """A dictionary made from pairs, as Python 2 pickled it, or from another dictionary, which is used itself."""
        if isinstance(values, dict) and values:
            return values
        self._count(len(values))
        return _set_items({}, [part for key, value in values for part in (key, value)])

    def _storage(self, what: str, kind: Global, key: str, location: str, size: int, view: Any = None) -> Any:
        """The storage that a persistent id describes. `view`, a part of another storage, occurs only in old files."""
        if what != "storage" or view is not None or not isinstance(key, str):
            raise DamagedPickle("it has something else in place of a storage")
        if location == "meta":
            return not_plain(META)
        dtype, itemsize = STORAGES[kind.name.rpartition(".")[2]]
        storage = Storage(key, dtype, itemsize, whole_numbers([size])[0])
        if self.storages.setdefault(key, storage) != storage:
            raise DamagedPickle(f"it describes the storage {key} twice, differently")
        return storage


def _at(stack: list[Any], start: int) -> list[Any]:
    """The stack from `start` on; a negative one would count from the end."""
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
        # Only plain keys: hashing deeply nested tuples overflows Python's stack, and hashing a number with millions of
        # digits is slow.
        if not all(map(_is_plain, key if isinstance(key, tuple) else (key,))):
            raise DamagedPickle("it has a dictionary whose keys are neither names nor numbers")
        target[key] = value
    return target


def _is_plain(key: Any) -> bool:
    if isinstance(key, int):
        return abs(key) <= MAX_NUMBER
    return isinstance(key, str | float | bytes | None)
