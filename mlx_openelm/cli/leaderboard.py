"""`mlx-openelm leaderboard`: saved results side by side, and beside what Apple published."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict

from .. import console
from ..errors import RequestError
from ..harness import compare, leaderboard, plots, tables
from ..harness.results import Result
from ..inputs import to_path
from ..messages import warn
from ..wording import some
from . import evaluate, flags

MAIN_FLAGS = ("--published", "--plot", "--format", "--json")
EXAMPLES = """\
  mlx-openelm leaderboard 270m.json 270m-4bit.json
  mlx-openelm leaderboard 1.1b.json --format markdown --plot 1.1b.png
  mlx-openelm leaderboard *.json --published --plot leaderboard.png"""

_FORMATS = ("text", "markdown")


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `leaderboard` to its parser."""
    common = parser.groups["Common flags"]
    parser.groups["Arguments"].add_argument(
        "files", nargs="*", metavar="FILE", help="Results that `evaluate --output` wrote."
    )
    common.add_argument("--published", **flags.SWITCH, help="Also list what Apple published for its eight models.")
    common.add_argument(
        "--plot", metavar="FILE", help="Also draw the result into this PNG, SVG or PDF file; needs matplotlib."
    )
    common.add_argument(
        "--format", metavar="|".join(_FORMATS), default="text", help="How to print tables.  [default: %(default)s]"
    )
    flags.add_shared(common, "--json")


def run(args: Namespace) -> int:
    """Show saved results side by side, the best first.

    One result is shown by task, beside what Apple published. Two are also compared question by question, where they
    asked the same questions.
    """
    if not args.files:
        raise RequestError("Give at least one result of `mlx-openelm evaluate --output FILE`.")
    if args.format not in _FORMATS:
        raise RequestError(f"--format must be text or markdown, got {args.format!r}.")
    plot = None if args.plot is None else to_path(args.plot)
    if plot is not None:
        from ..quantization.report import check_picture

        check_picture(plot)
    results = leaderboard.read([to_path(file) for file in args.files])
    if len(results) == 1 and not args.published:
        _show_one(results[0], args)
        if plot is not None:
            plots.draw_comparison(results[0], plot)
    else:
        entries = leaderboard.entries(results, published=args.published)
        if differing := leaderboard.asked_differently(results):
            warn(f"The results asked different questions, or with other prompts, in {some(differing)}.")
        _show_all(results, entries, args)
        if plot is not None:
            plots.draw_leaderboard(entries, plot, leaderboard.describe(results))
    if plot is not None:
        console.say(f"Drew {args.plot}")
    return 0


def _show_one(result: Result, args: Namespace) -> None:
    if args.json:
        console.print_json({"model": result.name, "suite": result.suite, "comparison": compare.to_json(result)})
    else:
        evaluate.show(result, args.format)


def _show_all(results: list[Result], entries: list[leaderboard.Entry], args: Namespace) -> None:
    pairs = leaderboard.tests(*results) if len(results) == 2 else {}
    if args.json:
        tests = {task: asdict(test) for task, test in pairs.items()}
        console.print_json({"leaderboard": leaderboard.to_json(entries), "tests": tests})
        return
    for line in tables.render(leaderboard.table(entries), args.format):
        console.print_line(line)
    print()
    width = None if args.format == "markdown" else console.columns(sys.stdout) or 80
    console.print_line(console.wrap(leaderboard.describe(results), width))
    if pairs:
        print()
        text = (
            f"{results[0].name} against {results[1].name} on the same questions; p is that of a split into better and "
            "worse as uneven as this one if both were equal:"
        )
        console.print_line(console.wrap(text, width))
        for line in tables.render(leaderboard.tests_table(results[0], results[1]), args.format):
            console.print_line(line)
