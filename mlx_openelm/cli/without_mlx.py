"""`COMMAND --help` on a machine without MLX: the modules that declare the flags import it, but compute nothing."""

from __future__ import annotations

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Anything(type):
    """A class whose attributes are the class itself: it can be named in annotations and as a base class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, _: Any) -> Any:
        return cls

    __ror__ = __or__


class _Placeholder(metaclass=_Anything):
    def __new__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder


class _Finder(Loader):
    """Finds an empty module for `mlx` and everything in it."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "mlx" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    """If MLX cannot be imported, let placeholders be imported instead. For a process that only prints help."""
    try:
        import mlx.core  # noqa: F401
    except ImportError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
