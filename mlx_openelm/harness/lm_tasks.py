"""Runs tasks of lm-eval."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, RequestError
from ..wording import did_you_mean, install
from . import data, lm_results, paper_tasks
from .options import EvaluateOptions
from .results import TaskResult
from .scorer import Scorer
from .suites import FOLDERS, Wanted

# Called with a task's name when its requests begin.
Began = Callable[[str], object]
# Errors of data sets that cannot be had, beside those of files and connections.
_ABSENT = ("DatasetNotFoundError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "RepositoryNotFoundError")
_QUIET = ("lm_eval", "datasets", "httpx", "httpx2")


def prepare() -> None:
    """Import lm-eval, and silence what it and `datasets` print.

    Raises:
        RequestError: it is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RequestError(f"Tasks of lm-eval need it ({error}): {install('evaluate')}.") from None
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # it reports each of its retries


def make_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's task manager, which knows all of these tasks.

    Raises:
        RequestError: a name that lm-eval does not have, or a pattern that none of its names matches.
    """
    import lm_eval.tasks

    # Reading all of lm-eval's 14,000 files takes seconds.
    root, own = Path(lm_eval.tasks.__file__).parent, [] if include_path is None else [include_path]
    folders = sorted({root / FOLDERS[name] for name in names if name in FOLDERS})
    if folders or own:
        manager = lm_eval.tasks.TaskManager(include_path=[*folders, *own], include_defaults=False)
        if _knows(manager, names):
            return manager
    manager = lm_eval.tasks.TaskManager(include_path=include_path)
    for name in names:
        if not matching([name], manager):
            hint = did_you_mean(name, manager.all_tasks)
            hint = hint and f" ({hint})"
            raise RequestError(f"There is no task {name!r} in lm-eval{hint}; `lm-eval ls tasks` lists them.")
    return manager


def matching(names: Iterable[str], manager: Any) -> list[str]:
    """The tasks with these names, or that these patterns with `*`, `?` and `[...]` match, as in lm-eval's command.

    Files of tasks stay as they are.
    """
    found: dict[str, None] = {}
    for name in names:
        if os.path.isfile(name):
            found[name] = None
        found |= dict.fromkeys(sorted(fnmatch.filter(manager.all_tasks, name)))
    return list(found)


def _knows(manager: Any, names: Sequence[Any]) -> bool:
    """Whether a manager has these tasks, and what groups among them have."""
    for name in names:
        if isinstance(name, dict):  # within a group: a task with other settings, a whole task, or a group
            parts = name.get("task")
            if isinstance(parts, str) and "dataset_path" not in name:
                parts = [parts]
        elif (entry := manager.task_index.get(name)) is not None:
            parts = (entry.cfg or {}).get("task")
        else:
            return False
        if isinstance(parts, list) and not _knows(manager, parts):
            return False
    return True


def run(
    wanted: Sequence[Wanted],
    scorer: Scorer,
    options: EvaluateOptions,
    manager: Any,
    *,
    paper: bool = False,
    began: Began | None = None,
) -> Iterator[tuple[str, dict[str, TaskResult] | str, list[dict[str, Any]]]]:
    """Run tasks one after the other.

    Args:
        manager: from `make_manager`.
        paper: ask and score as Apple did.

    Yields:
        For each task its name; the results by name, with those of its parts, or the reason why it cannot run; and its
        questions with what was asked and answered.

    Raises:
        RequestError: `samples` names a task that is not among these, or a question that a task does not have.
        OpenELMError: a task's own code failed.
    """
    from .lm import OpenELMLM

    _check_samples(options.chosen, [one.name for one in wanted], manager)
    lm = OpenELMLM.of(scorer, chat_template=options.chat_template)
    shots: dict[str, int] = {}
    tasks: Iterable[tuple[Wanted, Sequence[Any] | str]] = ((one, _loaded(manager, one, options)) for one in wanted)
    if options.chosen:
        tasks = list(tasks)
        for one, loaded in tasks:
            if not isinstance(loaded, str):
                _samples(loaded, one.name, options.chosen, manager)  # before any runs
    for one, loaded in tasks:
        if isinstance(loaded, str):
            yield one.name, loaded, []
            continue
        for task in _tasks_of(loaded):
            name, count = task.config.task, task.config.num_fewshot
            if shots.setdefault(name, count) != count:
                raise RequestError(
                    f"{one.name} has the task {name} with {count} examples, and another of --tasks has it with "
                    f"{shots[name]}; run one after the other."
                )
            if paper:
                paper_tasks.adapt(task)
        if began is not None:
            began(one.name)
        try:
            found = _measure(loaded, one.name, lm, options, manager)
        except OpenELMError:
            raise
        except Exception as error:  # a mistake in the task's templates or its code
            text = " ".join(str(error).split()).rstrip(".")
            raise OpenELMError(f"The task {one.name} failed: {type(error).__name__}: {text}.") from error
        yield one.name, *found


def _loaded(manager: Any, one: Wanted, options: EvaluateOptions) -> Sequence[Any] | str:
    """A task, or the tasks of a group, with their data; or why they cannot be had."""
    try:
        with data.local_first(options.data_folder):
            return _load(manager, one, options.num_fewshot)
    except Exception as error:  # whatever a task's own code and its data raise
        return _reason(error, options.data, "--data")


def _measure(
    loaded: Sequence[Any], name: str, lm: Any, options: EvaluateOptions, manager: Any
) -> tuple[dict[str, TaskResult], list[dict[str, Any]]]:
    """The results of a task or a group, and its questions.

    This is lm-eval's `simple_evaluate` without its description of the machine, which imports PyTorch and asks pip.
    """
    import random

    import lm_eval
    import numpy as np

    random.seed(options.seed)
    np.random.seed(options.seed)
    for task in _tasks_of(loaded):
        if options.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=options.generation, update=True)
        task.set_fewshot_seed(seed=options.seed)
    found = lm_eval.evaluate(
        lm=lm,
        task_dict=manager.load(list(loaded)),
        limit=options.limit,
        samples=_samples(loaded, name, options.chosen, manager) or None,
        apply_chat_template=options.as_chat,
        fewshot_as_multiturn=options.as_chat and options.fewshot_as_multiturn is not False,
        system_instruction=options.system_instruction,
        bootstrap_iters=1000,
    )
    return lm_results.results(found), lm_results.records(found)


def _check_samples(chosen: Iterable[str], names: Sequence[str], manager: Any) -> None:
    """Refuse question numbers of a task that does not run, before any does; not if a task is named by its file."""
    known = _with_parts(names, manager)
    if all(name in manager.task_index for name in names) and (unknown := set(chosen) - known):
        raise RequestError(f"--samples names {min(unknown)!r}, which is not among the tasks.")


def _with_parts(names: Sequence[Any], manager: Any) -> set[str]:
    """These tasks, and those of groups and tags among them."""
    found: set[str] = set()
    for name in names:
        if isinstance(name, dict):
            parts = name.get("task") or []
            found |= _with_parts([parts] if isinstance(parts, str) else parts, manager)
        elif name not in found and (entry := manager.task_index.get(name)) is not None:
            parts = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
            found |= {name} | (set() if isinstance(parts, str | None) else _with_parts(list(parts), manager))
    return found


def _samples(loaded: Sequence[Any], name: str, chosen: Mapping[str, list[int]], manager: Any) -> dict[str, list[int]]:
    """The numbers of the questions to ask by task; those of a group count for each of its tasks."""
    found = {}
    for task in _tasks_of(loaded):
        own = task.config.task
        keys = [own, *(key for key in chosen if own in _with_parts([key], manager)), name]
        numbers = next((chosen[key] for key in keys if key in chosen), None)
        if numbers is None:
            continue
        count = len(list(task.eval_docs))
        if max(numbers) >= count:
            raise RequestError(f"--samples asks for question {max(numbers)} of {own}, which has {count}.")
        found[own] = numbers
    return found


def check(names: Sequence[str], folder: Path | None, folder_flag: str) -> None:
    """Load tasks with their data, to find out before a long run whether that works.

    Args:
        folder_flag: the flag that names the folder.

    Raises:
        RequestError: a task is not known, or has no data.
    """
    manager = make_manager(names, None)
    for name in matching(names, manager):
        try:
            with data.local_first(folder):
                _load(manager, Wanted(name), None)
        except Exception as error:  # whatever a task's own code and its data raise
            raise RequestError(f"{name}: {_reason(error, folder, folder_flag)}.") from None


def _load(manager: Any, wanted: Wanted, shots: int | None) -> list[Any]:
    """The task, or the group of tasks, or the tasks of a tag, with their number of examples."""
    loaded = manager._load_spec(wanted.name)
    loaded = loaded if isinstance(loaded, list) else [loaded]
    shots = wanted.shots if shots is None else shots
    for task in _tasks_of(loaded):
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:  # lm-eval's rule: where a task sets 0, examples would be wrong
            task.set_config(key="num_fewshot", value=shots)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        _check_examples(task)
    return loaded


def _check_examples(task: Any) -> None:
    """Refuse more examples in front of a question than the task has."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return
    count = len(list(task.fewshot_docs()))
    # Where examples come from the questions themselves, one more is drawn, since one may be the question.
    most = count - (task.config.fewshot_split == task.config.test_split)
    if wanted > most:
        raise RequestError(f"The task has {most} examples for its prompts, and {wanted} are wanted; see --num-fewshot.")


def _tasks_of(loaded: Sequence[Any]) -> list[Any]:
    """The tasks in tasks and groups."""
    return [task for one in loaded for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]


def _reason(error: Exception, folder: str | Path | None, folder_flag: str) -> str:
    """Why a task's data cannot be read, in one line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, RequestError):
        return text
    if "gated" in text.lower():
        return f"its data set is gated: accept its terms on the hub and run `hf auth login` ({text[:200]})"
    if not isinstance(error, OSError | EOFError) and type(error).__name__ not in _ABSENT:
        return f"it cannot be loaded: {type(error).__name__}: {text[:200]}"
    where = f"neither in {folder} nor on the hub" if folder else "not on the hub, or the hub cannot be reached"
    return f"its data is {where} ({text[:200]}); give a folder that has it with {folder_flag}"
