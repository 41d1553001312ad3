"""Behaviour specific to Macs, with stand-ins for macOS, Metal and Xcode's tools."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mlx_openelm import backend, blas, native
from mlx_openelm.cli import doctor
from mlx_openelm.native import build

import mlx.core as mx
import pytest
from gpu_devices import H100

ROOT = Path(__file__).parent.parent
GIB = 1 << 30


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the system look like a Mac to the package; a CPU is the default device."""
    # Python and the kernels keep seeing the real system, since other tests use them later.
    platform.uname()
    sysconfig.get_config_vars()
    assert native.status
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="arm64"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(blas, "state", "unneeded")
    monkeypatch.setattr(blas, "library", blas.library)


@pytest.fixture
def metal(mac: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Mac whose GPU is the default device; returns the recorded calls to Metal."""
    calls: list[Any] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    facts = {"max_recommended_working_set_size": 12 * GIB, "device_name": "Apple M9"}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(limit) or 7)
    monkeypatch.setattr(mx, "synchronize", lambda: calls.append("synchronize"))
    return calls


# backend.


def test_no_blas_is_opened(mac, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *_, **__: pytest.fail(f"{name} is opened"))
    blas.preload()
    assert blas.state == "unneeded" and blas.problem() is None


def test_available_memory_reserves_a_share_for_the_system(mac, monkeypatch):
    monkeypatch.setattr(mx, "get_active_memory", lambda: 3 * GIB)
    for total, available in ((16 * GIB, 9 * GIB), (6 * GIB, 0), (None, None)):
        monkeypatch.setattr(backend, "total_memory", lambda total=total: total)
        assert backend.available_memory() == available


def test_metal_keeps_the_model_resident_while_it_works(metal):
    with backend.wired_limit():
        assert metal == [12 * GIB]
    assert metal == [12 * GIB, "synchronize", 7]
    with pytest.raises(KeyError), backend.wired_limit():
        raise KeyError
    assert metal[3:] == [12 * GIB, "synchronize", 7]


def test_two_that_need_it_may_end_in_any_order(metal):
    one, other = backend.wired_limit(), backend.wired_limit()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert metal == [12 * GIB, "synchronize"]
    other.__exit__(None, None, None)
    assert metal == [12 * GIB, "synchronize", "synchronize", 7]


def test_on_a_macs_cpu_nothing_is_kept_resident(metal, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.cpu))
    with backend.wired_limit():
        pass
    assert metal == []


def test_devices_have_their_names(metal, monkeypatch):
    assert (backend.describe()["device"], backend.describe()["device_name"]) == ("Metal", "Apple M9")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: H100)
    assert backend.describe()["device"] == "CUDA"
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.cpu))
    assert backend.describe()["device"] == "CPU"


def test_threads_are_counted_without_cpu_affinity(mac, monkeypatch):
    for name in native.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(native, "Path", lambda _: Path("/nowhere"))
    assert native.thread_count() == 10


# doctor.


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_doctor_on_metal(metal):
    found = findings()
    assert found["Device"].value == "Metal, Apple M9"
    assert found.keys().isdisjoint({"C library", "CPU kernels", "BLAS", "Compiler"})


def test_doctor_on_a_macs_cpu(mac, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "kernels", None)
    monkeypatch.setattr(native, "status", native.examine(tmp_path))
    found = findings()
    assert "C library" not in found
    if os.environ.get(native.VARIABLE) != "0":
        assert found["CPU kernels"].value == "missing: not compiled"
    assert re.fullmatch(r"the system's, \d+ GFLOP/s in float32", found["BLAS"].value) and found["BLAS"].advice is None
    assert backend.slow_cpu_warning() is None


# The kernels, which are compiled only on request.


@pytest.mark.parametrize(("system", "compiles"), [("darwin", False), ("linux", True)])
def test_installing_compiles_nothing_on_a_mac(system, compiles, monkeypatch):
    calls: list[dict[str, Any]] = []
    setuptools, command = ModuleType("setuptools"), ModuleType("setuptools.command.build_ext")
    vars(setuptools).update(Distribution=object, Extension=lambda *_, **__: None, setup=lambda **a: calls.append(a))
    vars(command).update(build_ext=object)
    for module in (setuptools, ModuleType("setuptools.command"), command):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "platform", system)
    runpy.run_path(str(ROOT / "setup.py"))
    assert [set(values) for values in calls] == [{"distclass", "cmdclass", "ext_modules"} if compiles else set()]


COMPILER = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(json.dumps(arguments), file=log)
if "-o" in arguments:
    pathlib.Path(arguments[arguments.index("-o") + 1]).write_bytes(b"made")
"""


NANOBIND_HEADER = "".join(
    f"#define NB_VERSION_{part} {number}\n"
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), build.NANOBIND.split("."), strict=True)
)


def test_on_request_kernels_are_compiled_with_flags_for_macos(mac, monkeypatch, tmp_path):
    """A stand-in for clang records its arguments."""
    nanobind = tmp_path / "nanobind"
    for name, text in {"src/nb_combined.cpp": "", "include/nanobind/nanobind.h": NANOBIND_HEADER}.items():
        (nanobind / name).parent.mkdir(parents=True)
        (nanobind / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    compiler, log = tmp_path / "clang++", tmp_path / "log"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build(tmp_path / "there").read_bytes() == b"made"
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    linking = next(call for call in calls if "-lmlx" in call)
    assert linking[:4] == ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/../../mlx/lib"]
    compiling = [call for call in calls if "-c" in call]
    assert len(compiling) == len(list(build.SOURCES.glob("*.cpp"))) + 1
    assert all("-mcpu=apple-m1" in call and "-march=native" not in call for call in compiling)
    facts = json.loads((tmp_path / "there" / build.FACTS).read_text())
    assert (facts["machine"], facts["bytes"]) == ("arm64", 4)


def test_an_intel_mac_compiles_for_its_own_processor(mac, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    assert build.native_flag(["true"]) == "-march=native"


def test_without_xcodes_tools_the_error_says_how_to_install_them(tmp_path):
    """A Mac has programs of these names that only ask to install the tools."""
    for name in ("g++", "clang++", "c++"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'xcode-select: note: No developer tools were found' >&2\nexit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    code = """
import sys; sys.platform = "darwin"
from pathlib import Path
from mlx_openelm.native import build
build.find_nanobind = lambda: Path("/nowhere")
build.main()
"""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    advice = "run xcode-select --install, or name another compiler in CXX"
    assert done.stderr.splitlines()[-1] == f"Error: g++ and clang++ and c++ cannot compile them; {advice}."


def test_a_system_that_lists_no_instructions_is_not_reported_as_lacking_them(monkeypatch, tmp_path):
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "Path", lambda _: Path("/nowhere/cpuinfo"))
    (tmp_path / native.LIBRARY).touch()
    facts = {"mlx": mx.__version__, "sources": native.fingerprint(), "machine": os.uname().machine, "bytes": 0}
    (tmp_path / native.FACTS).write_text(json.dumps(facts | {"instructions": ["asimddp"]}))
    assert native.examine(tmp_path) is None


def test_the_text_on_a_macs_cpu_equals_plain_mlx(tmp_path):
    """Nothing compiled, the CPU as the default device: no warning, and the same text as without kernels anywhere."""
    code = """
import sys, warnings
warnings.simplefilter("error")
if len(sys.argv) > 1:
    import platform; sys.platform = "darwin"
    from pathlib import Path
    from mlx_openelm import native
    native.__file__ = f"{sys.argv[1]}/__init__.py"
    import sysconfig; sysconfig.get_path = lambda name: "/nowhere"
from mlx_openelm import generate, load
import mlx.core as mx
mx.set_default_device(mx.cpu)
model, tokenizer = load("tiny")
print(model.expanded, repr(generate(model, tokenizer, "ROMEO.", max_tokens=40)))
"""

    def run(*arguments: str, **variables: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run(str(tmp_path), MLX_OPENELM_NATIVE="1") == run(MLX_OPENELM_NATIVE="0", MLX_OPENELM_BLAS="0")
