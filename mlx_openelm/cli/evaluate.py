"""`mlx-openelm evaluate`: what a model scores on tasks, beside what Apple published."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from .. import console
from ..errors import RequestError
from ..harness import compare, tables
from ..harness.evaluating import answers_path, evaluate
from ..harness.options import EvaluateOptions
from ..harness.results import Result
from ..harness.suites import LICENSES
from ..hub import catalog
from ..inputs import to_path
from ..wording import counted
from . import flags

MAIN_FLAGS = (
    "--model",
    "--checkpoints",
    "--suite",
    "--tasks",
    "--data",
    "--limit",
    "--output",
    "--adapter-path",
    "--json",
)
EXAMPLES = """\
  mlx-openelm evaluate --model 270m --suite zero_shot --output 270m.json
  mlx-openelm evaluate --model 1.1b --suite openllm --mode paper --data datasets --output 1.1b.json
  mlx-openelm evaluate --suite commonsense --tasks openbookqa --data LLM-Adapters/dataset --limit 100
  mlx-openelm evaluate --model 270m-instruct --tasks gsm8k --num-fewshot 5 --apply-chat-template"""

_WIDTH = 80  # of notes that are piped


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `evaluate` to its parser."""
    common, model, output = (parser.groups[title] for title in ("Common flags", "Model", "Output"))
    parser.groups["Arguments"].add_argument(
        "more_tasks", nargs="*", metavar="TASK", help="More tasks, as in `--tasks boolq piqa`."
    )
    flags.add_shared(common, "--model")
    common.add_argument(
        "--checkpoints",
        metavar="corenet:SIZE",
        help="Instead of a model the eleven checkpoints that Apple published of its pretraining.",
    )
    flags.add_fields(parser, EvaluateOptions)
    output.add_argument(
        "--plot", metavar="FILE", help="Also draw the result into this PNG, SVG or PDF file; needs matplotlib."
    )
    flags.add_shared(common, "--json")
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(output, "--overwrite")


def run(args: Namespace) -> int:
    """Measure what a model scores on tasks, beside what Apple published.

    Tasks are lm-eval's, in Apple's suites as Apple ran them; `--suite commonsense` needs no lm-eval. With --output
    every answer is kept at once, and the same command goes on where it was stopped.
    """
    given = flags.given(args, EvaluateOptions)
    if args.more_tasks:
        given["tasks"] = (*given.get("tasks", ()), *args.more_tasks)
    options = EvaluateOptions(**given)
    plot = None if args.plot is None else to_path(args.plot)
    if plot is not None:
        from ..quantization.report import check_picture

        check_picture(plot)
    if args.checkpoints is not None:
        return _run_checkpoints(args, options, plot)
    result = evaluate(
        args.model,
        options,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        expand=args.expand,
        overwrite=args.overwrite,
    )
    if args.json:
        console.print_json({**result.to_json(), "comparison": compare.to_json(result)})
    else:
        show(result)
    for name, reason in result.missing.items():
        console.say(f"{name} did not run: {reason}")
    for name in LICENSES.keys() & result.tasks.keys():
        console.say(f"The data set of {name} is {LICENSES[name]}.")
    if options.output is not None:
        output = to_path(options.output)
        console.say(f"Wrote {output}; the answers are in {answers_path(output)}")
    if plot is not None:
        from ..harness import plots

        plots.draw_comparison(result, plot)
        console.say(f"Drew {args.plot}")
    return 0


def _run_checkpoints(args: Namespace, options: EvaluateOptions, plot: Path | None) -> int:
    """Measure the published checkpoints of a size."""
    from ..harness import checkpoints

    given = {name: getattr(args, name) for name in ("adapter_path", "config_yaml", "revision", "expand")}
    given["model"] = None if args.model == catalog.TINY else args.model  # which is the default
    for flag, value in given.items():
        if value is not None:
            raise RequestError(f"--checkpoints and --{flag.replace('_', '-')} exclude each other.")
    results = checkpoints.evaluate_checkpoints(
        args.checkpoints, options, dtype=args.dtype, tokenizer=args.tokenizer, overwrite=args.overwrite
    )
    if args.json:
        console.print_json({"checkpoints": args.checkpoints, "results": checkpoints.to_json(results)})
    else:
        for line in tables.text(checkpoints.table(results)):
            console.print_line(line)
    if plot is not None:
        from ..harness import plots

        plots.draw_course(checkpoints.courses(results), plot, args.checkpoints)
        console.say(f"Drew {args.plot}")
    return 0


def show(result: Result, style: str = "text") -> None:
    """Print a result's tables."""
    for line in tables.render(compare.table(result), style):
        console.print_line(line)
    width = console.columns(sys.stdout) or _WIDTH
    speed = result.speed.get("requests_per_second")
    note = compare.note(result)
    if speed and result.speed["requests"]:
        note += f" {counted(int(result.speed['requests']), 'request')}, {speed:,.1f} per second."
    print()
    console.print_line(note if style == "markdown" else console.wrap(note, width))
    if headline := compare.headline(result):
        print()
        for line in tables.render(headline, style):
            console.print_line(line)
