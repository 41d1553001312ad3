"""Commands run in the tests' own process, which takes a tenth of the time of another one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mlx_openelm.cli.main import main

import pytest
from huggingface_hub import constants


def run_here(
    *args: object,
    stdin: str | bytes = b"",
    folder: Path | str = ".",
    env: Mapping[str, str] | None = None,
    offline: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `mlx-openelm` in `folder`, without a terminal.

    Args:
        env: more variables of the environment.
        offline: False for the hub that the fixture `hub` set up.
    """
    words = [str(word) for word in args]
    data = stdin.encode() if isinstance(stdin, str) else stdin
    out, errors = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(sys, "argv", ["mlx-openelm"])
        for name, file in (("stdin", io.BytesIO(data)), ("stdout", out), ("stderr", errors)):
            patch.setattr(sys, name, io.TextIOWrapper(file, encoding="utf-8", write_through=True))
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
        with pytest.raises(SystemExit) as end:
            main(words)
        return subprocess.CompletedProcess(
            words, int(end.value.code or 0), out.getvalue().decode(), errors.getvalue().decode()
        )
