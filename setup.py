"""Compiles the CPU kernels during installation on Linux, if there is a compiler; the rest is in pyproject.toml.

A Mac uses its GPU and does not need them; `python -m mlx_openelm.native` compiles them on request.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path(__file__).parent / "mlx_openelm" / "native"


def _builder():
    """`mlx_openelm/native/build.py`, loaded by its path: the package itself needs MLX."""
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles with our own builder. Without a compiler or MLX, it installs without kernels, and `doctor` says so."""

    def run(self) -> None:
        folder = NATIVE if self.inplace else Path(self.build_lib) / "mlx_openelm" / "native"
        builder = _builder()
        try:
            builder.build(folder)
        except Exception as error:  # the package works without the kernels
            print(f"warning: the CPU kernels were not compiled, so plain MLX will be used: {error}")

    def get_outputs(self) -> list[str]:
        builder, folder = _builder(), Path(self.build_lib) / "mlx_openelm" / "native"
        return [str(folder / name) for name in (builder.LIBRARY, builder.FACTS) if (folder / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class WithKernels(Distribution):
    """Marks the wheel as specific to this platform."""

    def has_ext_modules(self) -> bool:
        return True


if sys.platform == "darwin":
    setup()
else:
    setup(
        distclass=WithKernels,
        cmdclass={"build_ext": BuildKernels},
        ext_modules=[Extension("mlx_openelm.native.kernels", [], optional=True)],
    )
