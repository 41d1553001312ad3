"""`mlx-openelm pretrain`: training on text.

Flags, YAML keys and Python arguments are the fields of `PretrainOptions`.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from .. import console
from ..errors import RequestError
from ..inputs import to_path
from ..training import config_file
from ..training.options.pretraining import PretrainOptions
from ..training.pretrain import Pretrained, pretrain, saved_options
from ..training.recipes import RECIPES, find_recipe
from ..training.run.distributed import Processes
from ..training.run.folder import RUN
from ..training.run.preparing import Loading
from ..training.run.progress import RunProgress, fitted
from ..wording import counted, size
from . import flags
from .tuning import show_samples, validation_lines

MAIN_FLAGS = (
    *("--config", "--model", "--data", "--valid", "--mode", "--iters", "--batch-size", "--learning-rate"),
    *("--output", "--resume"),
)
EXAMPLES = """\
  mlx-openelm pretrain --config openelm-270m --data my_text --output my_run --iters 1000
  mlx-openelm pretrain --config my_run.yaml --output my_run
  mlx-openelm pretrain --resume --output my_run"""

_MODEL_KEYS = ("model", "tokenizer", "config_yaml", "revision", "dtype")


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `pretrain` to its parser."""
    common, model, output = (parser.groups[title] for title in ("Common flags", "Model", "Output"))
    common.add_argument(
        "--config",
        "-c",
        action="append",
        metavar="FILE",
        help=f"YAML file with any settings of the run, or one of {', '.join(RECIPES)}; flags override it.",
    )
    common.add_argument(
        "--model",
        metavar="MODEL",
        help="A size (270m, 450m, 1.1b, 3b) for new weights, or a model to continue from: a folder, a hub repository, "
        "a .pt file. YAML files can give sizes of their own.",
    )
    flags.add_fields(parser, PretrainOptions)
    flags.add_shared(model, "--tokenizer", "--config-yaml", "--revision", "--dtype")
    flags.add_shared(output, "--overwrite", "--json")


def run(args: Namespace) -> int:
    """Train a model on text, from random weights or from a model's own.

    The folder of the run holds a model that loads, metrics, a plot and checkpoints. Ctrl-C saves, and --resume
    continues exactly where the run stopped, after a crash too.
    """
    given = {key: getattr(args, key) for key in _MODEL_KEYS if getattr(args, key) is not None}
    given |= flags.given(args, PretrainOptions)
    place, values = _file_settings(given, args.config or [])
    of_file = values.pop("model", None)
    from_file = {} if "model" in given else {"model": of_file}
    model = given.pop("model", of_file)
    merged = config_file.merge(PretrainOptions, values, given, model_keys=_MODEL_KEYS[1:], place=place)
    if model is None:
        raise RequestError("--model is needed: a size such as 270m, or a model to continue from; or give --config.")
    options, loading = merged.options, Loading(**merged.model)
    leads = Processes().leads
    if not leads:
        warnings.simplefilter("ignore")  # the first process prints them
    progress = RunProgress()
    try:
        with progress:
            done = pretrain(model, options, loading=loading, overwrite=args.overwrite, listener=progress)
    except KeyboardInterrupt:
        if leads and not progress.began:
            console.say("Stopped before training began; nothing was saved.")
        return 130
    except RequestError as error:
        raise config_file.with_place(error, from_file | merged.from_file, place) from None
    if not leads:
        return 0  # an error would make mlx.launch end the first process, which may still be writing
    if args.json:
        console.print_json(_to_json(done))
    else:
        _show(done)
    return 130 if done.interrupted else 0


def _file_settings(given: dict[str, Any], configs: list[str]) -> tuple[str, dict[str, Any]]:
    """The file whose settings the flags override, and these: the one given, or that of the run to resume."""
    if len(configs) > 1:
        raise RequestError("--config takes one file; put all settings into it.")
    if configs:
        return configs[0], config_file.read(find_recipe(configs[0]))
    folder = given.get("output", PretrainOptions().output)
    return str(to_path(folder) / RUN), saved_options(folder) if given.get("resume") else {}


def _show(done: Pretrained) -> None:
    for line in _summary(done):
        console.print_line(fitted(line, sys.stdout))
    if done.interrupted:
        # A line of its own, never broken, to be copied.
        print(f"  mlx-openelm pretrain --resume --output {shlex.quote(done.output)}")
    if done.samples:
        show_samples(done.samples)


def _summary(done: Pretrained) -> Iterator[str]:
    """What was trained and measured, and what the folder has, a line each."""
    result, speed = done.training, ""
    if result.tokens_per_second:
        share = result.tokens_per_second * done.flops_per_token / done.peak_flops
        speed = f", {result.tokens_per_second:,.0f} tokens/s ({share:.0%} of the device's peak)"
    yield (
        f"Trained {counted(result.steps, 'step')}, {counted(result.trained_tokens, 'token')} learned{speed}, "
        f"peak memory {size(result.peak_memory * 1e9)}"
    )
    if padding := done.data.get("padding"):
        share = padding / done.data["positions"]
        yield f"Padding: {padding:,} of {done.data['positions']:,} positions ({share:.1%})"
    yield from validation_lines(result)
    for name, path in done.models.items():
        loss = done.validation.get(name)
        measured = f", validation loss {loss:.3f}" if loss is not None else ""
        yield f"Wrote {path}: {_content(done, name)}{measured}"
    yield f"Use it with --model {shlex.quote(done.models['model'])}"
    if done.interrupted:
        yield f"Stopped after step {result.steps:,} of {result.total_steps:,}, and saved; continue with:"


def _content(done: Pretrained, name: str) -> str:
    """Which weights a folder has."""
    averages = {"model-ema": "the moving average of the weights", "model-average": "the mean of the last checkpoints"}
    which = f"the weights of step {done.model_step:,}"
    if done.model_step != done.training.steps:
        which += ", where the validation loss was lowest"
    return averages.get(name, which)


def _to_json(done: Pretrained) -> dict[str, Any]:
    values = {key: value for key, value in asdict(done).items() if key != "training"}
    return values | asdict(done.training)
