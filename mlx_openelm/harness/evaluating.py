"""`evaluate`: a model on tasks, from its name to a result."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .. import backend, console
from ..errors import OpenELMError, RequestError
from ..formats.atomic import new_file
from ..generation.cache_origin import dtype_of, fingerprint
from ..generation.memory import model_bytes
from ..inputs import to_path
from ..loading import build_model, check_dtype
from ..model import OpenELM
from ..sources import Source, open_source
from ..text.tokenizer import Tokenizer
from ..version import __version__
from . import own_suites
from .answers import Answers
from .options import OWN_PROMPTS, EvaluateOptions
from .own_suites import Began, Records, Runner
from .results import Result
from .scorer import Scorer
from .suites import Wanted, wanted

if TYPE_CHECKING:
    from ..adapters.switching import AdapterPaths

_PACKAGES = ("mlx", "lm-eval", "datasets")
# Called with a task's name before it runs, and then with its number of answered requests and of all.
Progress = Callable[[str, int, int], None]


def evaluate(
    model: str | Path = "tiny",
    options: EvaluateOptions | None = None,
    *,
    adapter_path: AdapterPaths | None = None,
    dtype: str | mx.Dtype | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    expand: bool | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = True,
) -> Result:
    """Measure a model on tasks.

    Every answer is kept beside `options.output` as it comes, so that the same call goes on where another was stopped.
    A task whose data is missing is listed in the result's `missing`; the others run.

    Args:
        model, adapter_path, dtype, tokenizer, config_yaml, revision, expand: as for `load`; nothing is rounded.
        overwrite: replace an output that is the result of another model or of other tasks.
        progress: by default a bar for each task; False or None shows nothing.

    Raises:
        RequestError: a bad value, an unknown task, an output of something else, lm-eval is missing; or as `load`.
        OpenELMError: no task could run, or the logits are not finite.
    """
    options = EvaluateOptions(suite="commonsense") if options is None else options
    check_dtype(model, dtype)
    runner = _runner(options)
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    loaded, adapters = _load(source, adapter_path, dtype, expand)
    about = about_model(loaded, source, adapters)
    output = None if options.output is None else to_path(options.output)
    if output is not None:
        _check_output(output, about, options, overwrite)
    return measure(loaded, source.tokenizer, options, about, runner=runner, progress=progress)


def measure(
    model: OpenELM,
    tokenizer: Tokenizer,
    options: EvaluateOptions,
    about: dict[str, Any],
    *,
    runner: Runner | None = None,
    progress: Progress | bool | None = True,
) -> Result:
    """`evaluate` for a model that is loaded already; `about` describes it (see `about_model`)."""
    runner = _runner(options) if runner is None else runner
    output = None if options.output is None else to_path(options.output)
    result = Result(
        about,
        suite=options.suite,
        mode=None if options.suite is None or options.suite in OWN_PROMPTS else options.mode,
        settings=settings_of(options),
        versions={"mlx-openelm": __version__, "python": platform.python_version(), **_versions()},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    scorer = Scorer(
        model,
        tokenizer,
        batch_size=int(options.batch_size),
        max_length=options.max_length,
        keep_bos=result.mode != "paper",
        seed=options.seed,
    )
    records: Records = []
    with Answers(scorer.setting, None if output is None else answers_path(output)) as answers:
        scorer.answers = answers
        bars = console.Stages(unit="requests") if progress is True else nullcontext(progress or None)
        with backend.wired_limit(), bars as show:
            started = time.perf_counter()
            for name, found, questions in runner(scorer, _shown(scorer, show)):
                if isinstance(found, str):
                    result.missing[name] = found
                else:
                    result.tasks |= found
                    records += questions
            seconds = time.perf_counter() - started
    result.speed = {"requests": scorer.computed, "seconds": seconds, "requests_per_second": scorer.computed / seconds}
    if not result.tasks:
        name, reason = next(iter(result.missing.items()))
        raise OpenELMError(f"No task could run: {name}: {reason}.")
    if output is not None:
        if options.log_samples:
            with new_file(samples_path(output)) as partial, partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        result.save(output)
    return result


def answers_path(output: Path) -> Path:
    """Where the answers of a run are kept."""
    return output.with_name(f"{output.stem}.answers.jsonl")


def samples_path(output: Path) -> Path:
    """Where the questions of a run are written."""
    return output.with_name(f"{output.stem}.samples.jsonl")


def _runner(options: EvaluateOptions) -> Runner:
    """The function that runs the tasks; everything that can be checked without a model is checked."""
    _ = options.chosen, options.generation
    if options.suite in OWN_PROMPTS:
        return own_suites.runner(options)
    from . import lm_tasks

    lm_tasks.prepare()
    suite, names = options.suite, options.task_names
    tasks = [Wanted(name) for name in names] if suite is None else wanted(suite, names)
    folder = None if options.include_path is None else to_path(options.include_path)
    manager = lm_tasks.make_manager([task.name for task in tasks], folder)
    if suite is None:  # names may be patterns
        tasks = [Wanted(name) for name in lm_tasks.matching(names, manager)]
    paper = suite is not None and options.mode == "paper"
    return lambda scorer, began: lm_tasks.run(tasks, scorer, options, manager, paper=paper, began=began)


def _shown(scorer: Scorer, show: Progress | None) -> Began:
    def began(task: str) -> None:
        scorer.progress = None if show is None else lambda done, total: show(task, done, total)

    return began


def _load(
    source: Source, adapter_path: AdapterPaths | None, dtype: str | mx.Dtype | None, expand: bool | None
) -> tuple[OpenELM, list[str]]:
    """The model with its adapters, and their names."""
    from ..adapters.attaching import attach
    from ..adapters.switching import read_mixture

    adapter = None if adapter_path is None else read_mixture(adapter_path, source.checkpoint.config)
    with source.reading():
        model = build_model(source.checkpoint, dtype=dtype, expand=expand)
    if adapter is None or adapter_path is None:
        return model, []
    attach(model, adapter)
    if isinstance(adapter_path, list | tuple):
        return model, [str(path) for path in adapter_path]
    return model, [str(adapter_path)]


def about_model(model: OpenELM, source: Source, adapters: list[str]) -> dict[str, Any]:
    """What a result says about its model."""
    size, parameters = model_bytes(model), model.config.num_parameters
    release = source.release
    return {
        "name": source.name,
        "revision": source.path.name if source.repo is not None else None,
        "release": None if release is None else release.name,
        "adapter": ", ".join(adapters) or None,
        "fingerprint": fingerprint(model),
        "dtype": dtype_of(model),
        "parameters": parameters,
        "bytes": size,
        "bits": round(8 * size / parameters, 2),
        "device": backend.device(),
    }


def settings_of(options: EvaluateOptions) -> dict[str, Any]:
    """The options that change what is asked or answered."""
    names = (
        *("tasks", "data", "limit", "samples", "num_fewshot", "include_path", "seed", "apply_chat_template"),
        *("chat_template", "fewshot_as_multiturn", "system_instruction", "gen_kwargs", "max_length"),
    )
    values = {name: getattr(options, name) for name in names} | {"tasks": options.task_names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# Options that may change when a run goes on: its answers are kept, and count for more questions or fewer.
_MAY_CHANGE = ("limit", "samples")


def _check_output(output: Path, about: dict[str, Any], options: EvaluateOptions, overwrite: bool) -> None:
    """Refuse an output that holds something else, before anything is computed."""
    if overwrite or not output.exists():
        return
    hint = "give another --output, or --overwrite"
    try:
        there = Result.read(output)
    except RequestError:
        raise RequestError(f"{output} exists, and is no result of an evaluation; {hint}.") from None
    if any(there.model.get(name) != about[name] for name in ("fingerprint", "dtype")):
        raise RequestError(f"{output} is the result of another model, {there.name}; {hint}.")
    settings = settings_of(options)
    if (there.suite, there.settings.get("tasks")) != (options.suite, settings["tasks"]):
        raise RequestError(f"{output} is the result of other tasks; {hint}.")
    changed = [name for name in settings if name not in _MAY_CHANGE and there.settings.get(name) != settings[name]]
    if there.mode not in (None, options.mode):
        changed.append("mode")
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise RequestError(f"{output} is a result with another {flags}; {hint}.")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
