"""Make the package see another device than this machine's."""

from __future__ import annotations

from mlx_openelm import backend

import pytest


def pretend(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Make the package believe that `device` ("CPU", "Metal" or "CUDA") is MLX's default device."""
    monkeypatch.setattr(backend, "device", lambda: device)
    monkeypatch.setattr(backend, "on_gpu", lambda: device != "CPU")
