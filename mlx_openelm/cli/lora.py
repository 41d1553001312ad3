"""`mlx-openelm lora`: fine-tuning. Flags, YAML keys and Python arguments are the fields of `FineTuneOptions`."""

from __future__ import annotations

import shlex
import warnings
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from ..errors import RequestError
from ..hub import catalog
from ..inputs import to_path
from ..training import config_file
from ..training.finetune import FineTuned, Loading, finetune, saved_options
from ..training.options import FineTuneOptions
from ..training.run.distributed import Processes
from ..training.run.progress import RunProgress
from ..training.run.samples import Sample
from ..wording import counted
from . import console, flags

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
        help="A name (270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file.  [default: tiny]",
    )
    common.add_argument(
        "--config",
        "-c",
        action="append",
        metavar="FILE",
        help="A YAML file with any of these settings; flags override it.",
    )
    flags.add_fields(parser, FineTuneOptions)
    flags.add_shared(model, "--tokenizer", "--config-yaml", "--revision", "--dtype")
    model.add_argument("--chat-template", metavar="corenet|plain|FILE", help="How to write chats.")
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
    options, loading = _merged(given, args.config or [])
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
    if not leads:
        return 0  # an error would make mlx.launch end the first process, which may still be writing
    if args.json:
        console.print_json(_to_json(done))
    else:
        _show(done)
    return 130 if done.interrupted else 0


def _merged(given: dict[str, Any], configs: list[str]) -> tuple[FineTuneOptions, dict[str, Any]]:
    """The options, and the settings of the model: from flags, then the file, then the run that is resumed."""
    if len(configs) > 1:
        raise RequestError("--config takes one file; put all settings into it.")
    if configs:
        values = config_file.read(to_path(configs[0]))
        if given.get("resume"):
            values = {"train": True, **values}  # what is resumed is training
        return config_file.merge(FineTuneOptions, values, given, place=configs[0])
    saved: dict[str, Any] = {}
    if given.get("resume"):
        saved = saved_options(given.get("adapter_path", FineTuneOptions().adapter_path))
    return config_file.merge(FineTuneOptions, saved, given, place="run.json")


def _show(done: FineTuned) -> None:
    result, folder = done.training, done.adapter_path
    if result is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        print(
            f"Trained {counted(result.steps, 'step')}, {result.trained_tokens:,} tokens learned{speed}, "
            f"peak memory {result.peak_memory:.3f} GB"
        )
        if result.val_loss is not None:
            best = result.best_val_loss
            was_better = f" (best: {best:.3f} at step {result.best_step})" if best != result.val_loss else ""
            print(f"Validation loss {result.val_loss:.3f}{was_better}")
        if done.interrupted:
            print(
                f"Stopped after step {result.steps:,} of {result.total_steps:,}, and saved; continue with: "
                f"mlx-openelm lora --resume --adapter-path {shlex.quote(str(folder))}"
            )
        elif result.stopped != "finished":
            print(f"Stopped early, after step {result.steps:,} of {result.total_steps:,}")
        print(f"Wrote {folder}; use it with --adapter-path {shlex.quote(str(folder))}")
    if done.test is not None:
        print(f"Test loss {done.test.loss:.3f}, perplexity {done.test.perplexity:.3f}, {done.test.tokens:,} tokens")
    if done.samples:
        _show_samples(done.samples)


def _show_samples(samples: tuple[Sample, ...]) -> None:
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
