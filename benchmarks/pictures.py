"""Draws the pictures in docs/images again.

    python benchmarks/pictures.py

`losses.png` is what the README's first training command draws. It takes about a minute, and needs the extra `plots`.
`chat-page.png` is the chat page of `serve` after a short talk with `tiny-instruct`; it needs the extra `serve`,
Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def training_command() -> list[str]:
    """The words of the README's first training command, without the program's name."""
    lines = (ROOT / "README.md").read_text().splitlines()
    return shlex.split(next(line for line in lines if line.startswith("mlx-openelm lora --train")))[1:]


def draw_losses(target: Path) -> None:
    """Run the README's training command in a temporary folder, and copy the picture of its losses to `target`."""
    command = training_command()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lora").symlink_to(ROOT / "lora")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "mlx_openelm", *command], cwd=folder, env=environment, check=True)
        shutil.copy(Path(folder, command[command.index("--adapter-path") + 1], "losses.png"), target)


def draw_page(target: Path) -> None:
    """Talk with `tiny-instruct` on the server's chat page, and take a picture of it."""
    sys.path.append(str(ROOT / "tests"))
    from browser import chromium
    from serve_processes import process

    with process("--model", "tiny-instruct") as server, chromium() as browser:
        page = browser.new_page(viewport={"width": 960, "height": 600})
        page.goto(server.url)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature", exact=True).fill("0.7")
        page.get_by_label("Seed", exact=True).fill("2")
        page.get_by_label("Log-probabilities", exact=True).check()
        page.get_by_role("button", name="Close").click()
        for text in ("Good morrow!", "Who art thou?"):
            page.get_by_label("Message", exact=True).fill(text)
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Send", exact=True).wait_for()
        page.locator(".assistant").last.locator(".token").nth(3).hover()
        page.screenshot(path=target)


DRAWN: dict[str, Callable[[Path], None]] = {"losses.png": draw_losses, "chat-page.png": draw_page}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *DRAWN], default=[], help="Pictures to draw.  [default: all]")
    for name in parser.parse_args().names or DRAWN:
        DRAWN[name](IMAGES / name)


if __name__ == "__main__":
    main()
