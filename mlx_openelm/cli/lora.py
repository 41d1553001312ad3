"""`mlx-openelm lora`: fine-tuning. Flags, YAML keys and Python arguments are the fields of `FineTuneOptions`."""

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
from ..hub import catalog
from ..inputs import to_path
from ..training import config_file
from ..training.finetune import FineTuned, Loading, finetune, saved_options
from ..training.options import FineTuneOptions
from ..training.run.distributed import Processes
from ..training.run.folder import RUN
from ..training.run.progress import RunProgress, fitted
from ..training.run.samples import Sample
from ..training.run.trainer import EARLY, Result
from ..wording import counted, size
from . import flags

MAIN_FLAGS = (
    *("--model", "--train", "--data", "--iters", "--batch-size", "--learning-rate", "--num-layers", "--mask-prompt"),
    *("--adapter-path", "--resume"),
)
EXAMPLES = """\
  mlx-openelm lora --model 270m --train --data my_data --mask-prompt --iters 1000
  mlx-openelm lora --resume --adapter-path adapters
  mlx-openelm lora --model 270m --test --data my_data --adapter-path adapters
  mlx-openelm lora --train --data my_data -c my_run.yaml"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `lora` to its parser."""
    common, model, output = (parser.groups[title] for title in ("Common flags", "Model", "Output"))
    common.add_argument(
        "--model",
        metavar="MODEL",
        help="Model: a name (tiny, 270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file.  "
        "[default: tiny]",
    )
    parser.groups["Training"].add_argument(
        "--config",
        "-c",
        action="append",
        metavar="FILE",
        help="YAML file with any settings of the run; flags override it.",
    )
    flags.add_fields(parser, FineTuneOptions)
    flags.add_shared(model, "--tokenizer", "--config-yaml", "--revision", "--dtype")
    model.add_argument(
        "--chat-template",
        metavar="corenet|plain|FILE",
        help="How to write chats as text.  [default: the tokenizer's own, else corenet]",
    )
    flags.add_shared(output, "--overwrite", "--json")


def run(args: Namespace) -> int:
    """Fine-tune a model on your examples.

    --train trains an adapter, or with --fine-tune-type full the weights themselves; --test measures its perplexity.
    Ctrl-C saves, and --resume continues exactly where the run stopped, after a crash too.
    """
    given = {key: getattr(args, key) for key in config_file.MODEL_KEYS if getattr(args, key) is not None}
    given |= flags.given(args, FineTuneOptions)
    if "target_modules" in given:
        given["target_modules"] = tuple(part.strip() for text in given["target_modules"] for part in text.split(","))
    place, values = _file_settings(given, args.config or [])
    merged = config_file.merge(FineTuneOptions, values, given, place=place)
    options, loading = merged.options, merged.model
    name = loading.pop("model", catalog.TINY)
    leads = Processes().leads
    if not leads:
        warnings.simplefilter("ignore")  # the first process prints them
    progress = RunProgress()
    try:
        with progress:
            done = finetune(name, options, loading=Loading(**loading), overwrite=args.overwrite, listener=progress)
    except KeyboardInterrupt:
        if options.train and leads and not progress.began:
            console.say("Stopped before training began; nothing was saved.")
        return 130
    except RequestError as error:
        raise config_file.with_place(error, merged.from_file, place) from None
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
        values = config_file.read(to_path(configs[0]))
        # What is resumed is training.
        return configs[0], {"train": True, **values} if given.get("resume") else values
    folder = given.get("adapter_path", FineTuneOptions().adapter_path)
    return str(to_path(folder) / RUN), saved_options(folder) if given.get("resume") else {}


def _show(done: FineTuned) -> None:
    for line in _summary(done):
        print(fitted(line, sys.stdout))
    if done.interrupted:
        # A line of its own, never broken, to be copied.
        print(f"  mlx-openelm lora --resume --adapter-path {shlex.quote(str(done.adapter_path))}")
    if done.samples:
        show_samples(done.samples)


def _summary(done: FineTuned) -> Iterator[str]:
    """What was trained and measured, and what the folder has, a line each."""
    result = done.training
    if result is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        yield (
            f"Trained {counted(result.steps, 'step')}, {result.trained_tokens:,} tokens learned{speed}, "
            f"peak memory {size(result.peak_memory * 1e9)}"
        )
        yield from validation_lines(result)
        folder = shlex.quote(str(done.adapter_path))
        yield f"Wrote {done.adapter_path}: {_content(done)}; use it with --adapter-path {folder}"
        if done.best_checkpoint is not None:
            yield f"The weights with the lowest validation loss are in {done.best_checkpoint}"
    if done.test is not None:
        yield f"Test loss {done.test.loss:.3f}, perplexity {done.test.perplexity:.3f}, {done.test.tokens:,} tokens"
    if result is not None and done.interrupted:
        yield f"Stopped after step {result.steps:,} of {result.total_steps:,}, and saved; continue with:"


def validation_lines(result: Result) -> Iterator[str]:
    """The last validation loss, and the lowest, each with its step."""
    if result.val_loss is None:
        return
    line = f"Validation loss {result.val_loss:.3f} at {_step(result.val_step)}"
    if result.best_step != result.val_step:
        line += f"; the lowest was {result.best_val_loss:.3f} at {_step(result.best_step)}"
    elif result.val_step:
        line += ", the lowest"
    if result.val_step != result.steps:
        line += " (not validated after that)"
    yield line


def _step(step: int | None) -> str:
    return f"step {step:,}" if step else "step 0, before training"


def _content(done: FineTuned) -> str:
    """Which weights the run's folder has."""
    result = done.training
    assert result is not None
    which = "the last" if done.adapter_step == result.steps else "where the validation loss was lowest"
    early = f" (stopped early, after step {result.steps:,} of {result.total_steps:,})"
    return f"the weights of step {done.adapter_step:,}, {which}{early if result.stopped == EARLY else ''}"


def show_samples(samples: tuple[Sample, ...]) -> None:
    """Print each prompt's continuations before and after training, side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for sample in samples:
        table = Table(title=Text(f"{sample.prompt} ..."), expand=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(Text(sample.before.strip()), Text(sample.after.strip()))
        Console().print(table)


def _to_json(done: FineTuned) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": done.model,
        "adapter_path": done.adapter_path,
        "trained_parameters": done.trained_parameters,
        "total_parameters": done.total_parameters,
    }
    if done.training is not None:
        values |= asdict(done.training) | {"planned_memory": done.planned_memory}
    if done.test is not None:
        values |= {
            "test_loss": done.test.loss,
            "test_perplexity": done.test.perplexity,
            "test_tokens": done.test.tokens,
        }
    return values | {"samples": [asdict(sample) for sample in done.samples]}
