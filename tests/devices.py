"""Another device than this machine's, as the package sees it."""

from __future__ import annotations

from mlx_openelm import backend

import pytest


def pretend(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Let the package take `device` ("CPU", "Metal" or "CUDA") for MLX's default device."""
    monkeypatch.setattr(backend, "device", lambda: device)
    monkeypatch.setattr(backend, "on_gpu", lambda: device != "CPU")
