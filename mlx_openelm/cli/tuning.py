"""What `lora`, `dpo` and `grpo` share: flags, YAML files and Python arguments are fields of a dataclass of options."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from .. import console
from ..errors import RequestError, quote
from ..hub import catalog
from ..inputs import to_path
from ..training import config_file
from ..training.finetune import FineTuned, Loading, saved_options
from ..training.options import FineTuneOptions
from ..training.run.distributed import Processes
from ..training.run.folder import RUN
from ..training.run.method import Method
from ..training.run.progress import RunProgress, fitted, measured, preferred
from ..training.run.samples import Sample
from ..training.run.trainer import EARLY, Result
from ..training.step.evaluation import Evaluation
from ..wording import counted, flag, size
from . import flags

# Options whose flags may be repeated, or have several values with commas.
_LISTS = ("target_modules", "loss_type", "loss_weights", "reward_funcs", "reward_weights")
_NUMBERS = ("loss_weights", "reward_weights")
# What a command runs: `finetune`, or another function with its arguments.
Tune = Callable[..., FineTuned]


def add_flags(parser: flags.Parser, options: type[FineTuneOptions]) -> None:
    """Add the flags of a command to its parser.

    Args:
        options: the dataclass of its options.
    """
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
    flags.add_fields(parser, options)
    flags.add_shared(model, "--tokenizer", "--config-yaml", "--revision", "--dtype")
    model.add_argument(
        "--chat-template",
        metavar="corenet|plain|FILE",
        help="How to write chats as text.  [default: the tokenizer's own, else corenet]",
    )
    flags.add_shared(output, "--overwrite", "--json")


def run(args: Namespace, method: Method, tune: Tune) -> int:
    """Run a command.

    Args:
        method: what the command does.
        tune: the Python function of the same.
    """
    given = {key: getattr(args, key) for key in config_file.MODEL_KEYS if getattr(args, key) is not None}
    given |= flags.given(args, method.options)
    for name in _LISTS:
        if isinstance(given.get(name), tuple):
            given[name] = tuple(part.strip() for text in given[name] for part in text.split(","))
    for name in _NUMBERS:
        if name in given:
            given[name] = tuple(_number(name, text) for text in given[name])
    place, values = _file_settings(method, given, args.config or [])
    merged = config_file.merge(method.options, values, given, place=place)
    options, loading = merged.options, merged.model
    name = loading.pop("model", catalog.TINY)
    leads = Processes().leads
    if not leads:
        warnings.simplefilter("ignore")  # the first process prints them
    progress = RunProgress()
    try:
        with progress:
            done = tune(name, options, loading=Loading(**loading), overwrite=args.overwrite, listener=progress)
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
        _show(done, method)
    return 130 if done.interrupted else 0


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"{flag(name)} must be numbers, got {quote(text)}.") from None


def _file_settings(method: Method, given: dict[str, Any], configs: list[str]) -> tuple[str, dict[str, Any]]:
    """The file whose settings the flags override, and these: the one given, or that of the run to resume."""
    if len(configs) > 1:
        raise RequestError("--config takes one file; put all settings into it.")
    if configs:
        values = config_file.read(to_path(configs[0]))
        # What is resumed is training.
        return configs[0], {"train": True, **values} if given.get("resume") else values
    folder = given.get("adapter_path", method.options().adapter_path)
    return str(to_path(folder) / RUN), saved_options(folder, method) if given.get("resume") else {}


def _show(done: FineTuned, method: Method) -> None:
    for line in summary(done):
        console.print_line(fitted(line, sys.stdout))
    if done.interrupted:
        # A line of its own, never broken, to be copied.
        print(f"  mlx-openelm {method.options.command} --resume --adapter-path {shlex.quote(str(done.adapter_path))}")
    if done.samples:
        show_samples(done.samples)


def summary(done: FineTuned) -> Iterator[str]:
    """What was trained and measured, and what the folder has, a line each."""
    result = done.training
    if result is not None:
        speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
        yield (
            f"Trained {counted(result.steps, 'step')}, {_learned(done, result.trained_tokens)}{speed}, "
            f"peak memory {size(result.peak_memory * 1e9)}"
        )
        yield from validation_lines(result, rewarded=_is_rewarded(done))
        folder = shlex.quote(str(done.adapter_path))
        yield f"Wrote {done.adapter_path}: {_content(done)}; use it with --adapter-path {folder}"
        if done.best_checkpoint is not None:
            best = "highest validation reward" if _is_rewarded(done) else "lowest validation loss"
            yield f"The weights with the {best} are in {done.best_checkpoint}"
    if done.test is not None:
        yield _test(done, done.test)
    if result is not None and done.interrupted:
        yield f"Stopped after step {result.steps:,} of {result.total_steps:,}, and saved; continue with:"


def _is_rewarded(done: FineTuned) -> bool:
    """Whether the run learned from rewards, whose validation loss is minus the mean reward."""
    return done.counts == "completions"


def _learned(done: FineTuned, count: int) -> str:
    learned = counted(count, done.counts.removesuffix("s"))  # pairs, completions
    return f"{learned} learned" if done.counts == "tokens" else learned


def _test(done: FineTuned, test: Evaluation) -> str:
    if "reward" in test.metrics:
        return f"Test {measured(test.loss, test.metrics)}, {test.tokens:,} {done.counts}"
    if done.counts == "tokens":
        return f"Test loss {test.loss:.3f}, perplexity {test.perplexity:.3f}, {test.tokens:,} tokens"
    return f"Test loss {test.loss:.3f}{preferred(test.metrics)}, {test.tokens:,} {done.counts}"


def validation_lines(result: Result, *, rewarded: bool = False) -> Iterator[str]:
    """The last validation loss, and the lowest, each with its step; `rewarded` gives the mean rewards instead."""
    if result.val_loss is None:
        return
    what, best, sign = ("reward", "highest", -1) if rewarded else ("loss", "lowest", 1)
    line = f"Validation {what} {sign * result.val_loss:.3f} at {_step(result.val_step)}"
    if result.best_step != result.val_step:
        assert result.best_val_loss is not None
        line += f"; the {best} was {sign * result.best_val_loss:.3f} at {_step(result.best_step)}"
    elif result.val_step:
        line += f", the {best}"
    if result.val_step != result.steps:
        line += " (not validated after that)"
    yield line


def _step(step: int | None) -> str:
    return f"step {step:,}" if step else "step 0, before training"


def _content(done: FineTuned) -> str:
    """Which weights the run's folder has."""
    result = done.training
    assert result is not None
    best = "where the validation reward was highest" if _is_rewarded(done) else "where the validation loss was lowest"
    which = "the last" if done.adapter_step == result.steps else best
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
        values[f"trained_{done.counts}"] = values.pop("trained_tokens")
    if done.test is not None:
        values |= {"test_loss": done.test.loss, f"test_{done.counts}": done.test.tokens}
        if done.counts == "tokens":
            values["test_perplexity"] = done.test.perplexity
        values |= {f"test_{name}": value for name, value in done.test.metrics.items()}
    return values | {"samples": [asdict(sample) for sample in done.samples]}
