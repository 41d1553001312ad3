"""`mlx-openelm lora`: fine-tuning, with the flags, the YAML keys and the Python arguments of `FineTuneOptions`."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..hub import catalog
from ..inputs import to_path
from ..training import config_file
from ..training.finetune import FineTuned, Loading, finetune, saved_options
from ..training.options import FineTuneOptions
from ..training.run.distributed import Processes
from ..training.run.samples import Sample
from . import console, flags
from .run_progress import RunProgress


@flags.of_dataclass(FineTuneOptions, flags.FINE_TUNE, may_be_absent=True)
def run(
    model: Annotated[
        str | None,
        typer.Option(
            help="A name (270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file.  [default: tiny]"
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="A YAML file with any of these settings; flags come before it."),
    ] = None,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    revision: flags.Revision = None,
    dtype: flags.Dtype = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="corenet, plain or a jinja file to write chats with.", metavar="plain|corenet|FILE"),
    ] = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
    **values: Any,
) -> None:
    """Fine-tune a model on your examples.

    With --train an adapter is trained, or with --fine-tune-type full the weights themselves; with --test its
    perplexity is measured. Ctrl-C saves, and --resume goes on as if nothing had happened, after a crash too.
    """
    own = {"model": model, "tokenizer": tokenizer, "config_yaml": config_yaml, "revision": revision, "dtype": dtype,
           "chat_template": chat_template}  # fmt: skip
    given = {name: value for name, value in (own | values).items() if value is not None}
    for name in ("target_modules", "sample_prompts"):
        if name in given:
            given[name] = tuple(given[name])
    if "target_modules" in given:
        given["target_modules"] = tuple(part.strip() for text in given["target_modules"] for part in text.split(","))
    options, said = _merged(given, config)
    name = said.pop("model", catalog.TINY)
    leads = Processes().leads
    if not leads:
        warnings.simplefilter("ignore")  # the first process says the same
    progress = RunProgress()
    try:
        with progress:
            done = finetune(name, options, loading=Loading(**said), overwrite=overwrite, listener=progress)
    except KeyboardInterrupt:
        if options.train and leads and not progress.began:
            console.say("Stopped before training began; nothing was saved.")
        raise typer.Exit(130) from None
    if not leads:
        return  # without an error, on which mlx.launch would end the first, which may be writing
    if as_json:
        console.print_json(_to_json(done))
    else:
        _show(done)
    if done.interrupted:
        raise typer.Exit(130)


def _merged(given: dict[str, Any], config: str | None) -> tuple[FineTuneOptions, dict[str, Any]]:
    """The options, and what is said about the model: by flags, else by the file, else by the run that goes on."""
    if config is not None:
        file = to_path(config)
        return config_file.merge(FineTuneOptions, config_file.read(file), given, place=str(config))
    told: dict[str, Any] = {}
    if given.get("resume"):
        told = saved_options(given.get("adapter_path", FineTuneOptions().adapter_path))
    return config_file.merge(FineTuneOptions, told, given, place="run.json")


def _show(done: FineTuned) -> None:
    result, folder = done.training, done.adapter_path
    if result is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        print(
            f"Trained {result.steps:,} steps, {result.trained_tokens:,} tokens learned{speed}, "
            f"peak memory {result.peak_memory:.3f} GB"
        )
        if result.val_loss is not None:
            best = result.best_val_loss
            was_better = f" (best: {best:.3f} at step {result.best_step})" if best != result.val_loss else ""
            print(f"Validation loss {result.val_loss:.3f}{was_better}")
        if done.interrupted:
            print(
                f"Stopped after step {result.steps:,} of {result.total_steps:,}, and saved; go on with: "
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
    """Before and after, side by side."""
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
