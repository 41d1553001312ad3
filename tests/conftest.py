"""Fixtures that more than one test file uses."""

from __future__ import annotations

import gc
import json
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import mlx_openelm  # noqa: F401 (before MLX, which binds its BLAS when it is imported)
from mlx_openelm import native
from mlx_openelm.training.run import metrics

import mlx.core as mx
import numpy as np
import pytest
from covering import chosen
from fake_hub import FakeHub
from gpu_devices import HAS_GPU, STAND_IN, gpu_tests

# Tests press Ctrl-C; a shell that starts them in the background has them and their processes ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The references were computed in float32 on a CPU; a GPU may use TF32.
mx.set_default_device(mx.cpu)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-slow",
        action="store_true",
        help="also run tests of large models and long runs, all combinations of parameters, and all cases of the GPU "
        "tests on a CPU",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    seen = set()
    covered = defaultdict(list)
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))
        elif STAND_IN and item.path.name.startswith("test_gpu"):
            if any(mark.args[0] for mark in item.iter_markers("skipif")):
                continue
            name = item.nodeid.partition("[")[0]
            if name in seen and crc32(item.nodeid.encode()) % 6:
                item.add_marker(pytest.mark.skip(reason="a CPU stands in for a GPU, in a sixth of the cases"))
            seen.add(name)
        elif "covering" in item.keywords:
            covered[item.nodeid.partition("[")[0]].append(item)
    for cases in covered.values():
        strength = next(iter(cases[0].iter_markers("covering"))).args or (1,)
        # One id for each `parametrize`, whose values belong together, and for each fixture with parameters.
        kept = chosen([dict(enumerate(case.callspec._idlist)) for case in cases], *strength)
        for case in (case for index, case in enumerate(cases) if index not in kept):
            case.add_marker(pytest.mark.skip(reason="others cover its values: run with --run-slow"))


def pytest_collection_finish() -> None:
    """Leave the thousands of tests and all modules out of garbage collections, a third of a second each otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_certificate() -> Iterator[None]:
    """Clients trust one authority instead of all: reading those takes 40 ms, for every client and in every process.

    The servers of the tests speak plain HTTP.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(Path(__file__).parent / "fixtures" / "certificate.pem"))
        yield


@pytest.fixture(autouse=True)
def plain_unless_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU, `mx.compile` only acts in tests marked `compiled`, and in all tests with `--run-slow`.

    There it calls g++ for every kernel that the machine has not seen yet, half a second each: on a new machine that was
    a third of the time of all tests.
    """
    on_gpu = HAS_GPU and "gpu" in request.fixturenames
    if on_gpu or "compiled" in request.keywords or request.config.getoption("--run-slow"):
        yield
        return
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # for processes that the test starts
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of a run's losses, most of the time of a short run, is only drawn in tests marked `pictures`."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(metrics, "draw", lambda curves, path, title="": path.write_bytes(b"\x89PNG"))


@pytest.fixture(params=["kernels", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs twice: with our CPU kernels, and in plain MLX."""
    if request.param == "plain":
        monkeypatch.setattr(native, "kernels", None)
    elif native.kernels is None:
        pytest.skip(f"the kernels are not used: {native.status.detail}")


@pytest.fixture
def gpu() -> Iterator[None]:
    """The test computes on the GPU, except in blocks of `on("cpu")` (see `gpu_devices`)."""
    with gpu_tests():
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A running fake hub and an empty cache; this process talks to no other hub."""
    import huggingface_hub
    from huggingface_hub import constants

    with FakeHub() as server:
        home = tmp_path / "hf-home"
        # The environment is read when huggingface_hub is imported, which another test may have done.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # The shared client keeps the proxies and connections of its first use.
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def hub_env(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Environment variables that point a subprocess at `hub`; add them to `os.environ`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_CACHE": str(tmp_path / "hf-home" / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Results of the reference implementation: ids, greedy tokens, texts, loss, and `logits_0` to `logits_3`."""
    folder = Path(__file__).parent / "fixtures"
    answers = json.loads((folder / "shakespeare-reference.json").read_text())
    with np.load(folder / "shakespeare-reference.npz") as arrays:
        return answers | dict(arrays)
