"""The experiment trackers that `--report-to` may name, and whether their packages are installed."""

from __future__ import annotations

import importlib.util
import sys

from ...errors import RequestError, quote
from ...wording import install

TRACKERS = ("tensorboard", "wandb")


def check(report_to: str | None) -> tuple[str, ...]:
    """The trackers that `--report-to` names, each known and installed.

    Raises:
        RequestError: an unknown name, or a package that is missing.
    """
    names = tuple(dict.fromkeys(name.strip().lower() for name in (report_to or "").split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise RequestError(f"--report-to knows {' and '.join(TRACKERS)}, not {quote(name)}.")
        if name == "tensorboard" and tensorboard_module() is None:
            raise RequestError(f"--report-to tensorboard needs tensorboardX: {install('trackers')}.")
        if name == "wandb" and not _has("wandb"):
            raise RequestError(f"--report-to wandb needs Weights & Biases' package: {install('trackers')}.")
    return names


def tensorboard_module() -> str | None:
    """The installed module that writes TensorBoard's files; PyTorch's needs the package `tensorboard` too."""
    if _has("tensorboardX"):
        return "tensorboardX"
    return "torch.utils.tensorboard" if _has("torch") and _has("tensorboard") else None


def _has(package: str) -> bool:
    """Whether a package can be imported; a plain folder of that name, such as Weights & Biases' own, does not count."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError: it is imported already, and has no spec
        return package in sys.modules
    return spec is not None and spec.origin is not None
