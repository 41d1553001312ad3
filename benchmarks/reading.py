"""Counts the files and functions that a reader passes from `generate --prompt hi` to the first logits.

    python benchmarks/reading.py            # --list lists them

Counted are the package's files and distinct functions (no module or class bodies, lambdas or comprehensions) that the
main thread enters, from `mlx_openelm.cli.main.main()` until it enters a function named `logits`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx_openelm

PACKAGE = Path(mlx_openelm.__file__).parent
COMMAND = ["generate", "--prompt", "hi"]


class Reached(BaseException):
    """A function named `logits` was entered."""


def passed() -> list[tuple[str, str]]:
    """Each function as (file, qualified name), in the order of their first call."""
    from mlx_openelm.cli.main import main

    found: dict[CodeType, None] = {}

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not Path(code.co_filename).is_relative_to(PACKAGE):
            return
        is_body = not code.co_flags & 0x02 or code.co_name.startswith("<")  # bodies have no fast locals
        if not is_body:
            found.setdefault(code)
        if code.co_name == "logits":
            sys.setprofile(None)
            raise Reached

    sys.argv = ["mlx-openelm", *COMMAND]
    sys.setprofile(enter)
    try:
        main()
    except Reached:
        pass
    finally:
        sys.setprofile(None)
    return [(str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname) for code in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="also list every function")
    arguments = parser.parse_args()
    names = passed()
    for file, name in names if arguments.list else ():
        print(f"{file}: {name}")
    print(f"{len({file for file, _ in names})} files, {len(names)} functions")


if __name__ == "__main__":
    main()
