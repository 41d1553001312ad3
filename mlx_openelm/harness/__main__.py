"""`python -m mlx_openelm.harness`: lm-eval's own command line, which knows the model `openelm` here."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from ..errors import OpenELMError
from . import lm  # noqa: F401 (registers the model)

if __name__ == "__main__":
    try:
        cli_evaluate()
    except OpenELMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
