"""`python -m mlx_openelm.harness`: lm-eval's own command line, which knows the model `openelm` here."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

from . import lm  # noqa: F401 (registers the model)

if __name__ == "__main__":
    cli_evaluate()
