"""Rewards of completions: Python functions with TRL's arguments, and regular expressions."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import OpenELMError, RequestError, quote
from ...inputs import check_file, to_path
from ...wording import counted
from ..data.prompts import Prompt

# Called with `prompts`, `completions`, `completion_ids` and the columns of the data, each a list with an entry for
# every completion; gives as many numbers, or None where it does not apply.
RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Completion:
    """A sampled completion: its prompt, its ids, and its text without the token that ends it."""

    prompt: Prompt
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Rewards:
    """Functions that give completions rewards.

    Args:
        functions: by name, as metrics call them.
        weights: one for each.
    """

    functions: dict[str, RewardFunction]
    weights: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        return list(self.functions)

    def __call__(self, completions: Sequence[Completion]) -> list[list[float]]:
        """The rewards of each completion, one for each function; NaN where it does not apply.

        Raises:
            OpenELMError: a function fails, or returns something other than a number or None for each completion.
        """
        if not completions:
            return []
        columns = [self._column(name, completions) for name in self.functions]
        return [list(row) for row in zip(*columns, strict=True)]

    def _column(self, name: str, completions: Sequence[Completion]) -> list[float]:
        function = self.functions[name]
        arguments = _accepted(function, _arguments(completions))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout has the results, which may be JSON
                found = function(**arguments)
            values = [math.nan if value is None else float(value) for value in found]
        except (Exception, SystemExit) as error:
            raise OpenELMError(f"The reward function {name} failed: {_told(error)}.") from error
        if len(values) != len(completions):
            raise OpenELMError(
                f"The reward function {name} returned {counted(len(values), 'reward')} for {len(completions)} "
                "completions; it must return one for each."
            )
        if any(math.isinf(value) for value in values):
            raise OpenELMError(f"The reward function {name} returned an infinite reward.")
        return values


def make_rewards(
    functions: Sequence[str],
    patterns: Sequence[str],
    weights: Sequence[float] | None,
    given: Sequence[RewardFunction] = (),
) -> Rewards:
    """The rewards that options name, in the order of their weights.

    Args:
        functions: as `FILE.py:NAME`.
        patterns: regular expressions; the reward is 1 where it is found in the completion, else 0.
        weights: one for each; None is 1 each.
        given: functions of a Python caller, which come after those of files.

    Raises:
        RequestError: no rewards, a file or a name that does not exist, an invalid pattern, a wrong number of weights.
    """
    named: list[tuple[str, RewardFunction]] = [_load(spec) for spec in functions]
    named += [(getattr(function, "__name__", type(function).__name__), function) for function in given]
    for index, pattern in enumerate(patterns, 1):
        named.append(("regex" if len(patterns) == 1 else f"regex_{index}", _found(pattern)))
    if not named:
        raise RequestError("There are no rewards; give --reward-funcs FILE.py:NAME, or --reward-regex.")
    for name, function in named:
        if not callable(function):
            raise RequestError(f"reward_funcs are functions, got {quote(function)}; the options name those of files.")
        if _is_async(function):
            raise RequestError(f"{name} is an async function, which is not offered; make it an ordinary one.")
    names = [name for name, _ in named]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise RequestError(f"Two rewards are called {twice}; their metrics need different names.")
    if weights is not None and len(weights) != len(named):
        raise RequestError(
            f"--reward-weights must have a number for each of the {counted(len(named), 'reward')}, got {len(weights)}."
        )
    return Rewards(dict(named), tuple(weights or [1.0] * len(named)))


def _load(spec: str) -> tuple[str, RewardFunction]:
    """The function that `FILE.py:NAME` names, and its name."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise RequestError(f"--reward-funcs must be FILE.py:NAME, got {quote(spec)}.")
    path = to_path(file)
    check_file(path)
    try:
        function = getattr(_module(path), name, None)
    except (Exception, SystemExit) as error:
        raise RequestError(f"{file} cannot be imported: {_told(error)}.") from error
    if not callable(function):
        raise RequestError(f"{file} has no function {quote(name)}.")
    return name, function


def _is_async(function: RewardFunction) -> bool:
    """Whether a function, or an object that is called, returns something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _module(path: Path) -> Any:
    """The module of a file, imported once; it finds other modules of its folder."""
    key = f"_rewards_{abs(hash(path.resolve()))}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.append(folder)
    sys.modules[key] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    finally:
        _remove_last(sys.path, folder)
    return module


def _remove_last(path: list[str], folder: str) -> None:
    """Remove the entry that was appended, not one that was there before; the module may have removed it itself."""
    if folder in path:
        del path[len(path) - 1 - path[::-1].index(folder)]


def _found(pattern: str) -> RewardFunction:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RequestError(f"--reward-regex {quote(pattern)} is not a regular expression: {error}.") from None

    def reward(completions: Sequence[Any]) -> list[float]:
        return [float(compiled.search(_text(completion)) is not None) for completion in completions]

    return reward


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _arguments(completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """The arguments of reward functions: TRL's, and a list for each column of the data."""
    columns = dict.fromkeys(key for one in completions for key in one.prompt.columns)
    return {
        **{key: [one.prompt.columns.get(key) for one in completions] for key in columns},
        "prompts": [one.prompt.content for one in completions],
        # Of messages, a completion is a message too.
        "completions": [
            one.text if isinstance(one.prompt.content, str) else [{"role": "assistant", "content": one.text}]
            for one in completions
        ],
        "completion_ids": [one.tokens for one in completions],
    }


def _accepted(function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The arguments that a function takes: all if it has `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return arguments
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in arguments.items() if name in names}


def _told(error: BaseException) -> str:
    """An error of a user's code in one line, with its place: the last line of the user's file."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith("<") and Path(code.co_filename) != Path(__file__):
            place = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return ": ".join(filter(None, (type(error).__name__, str(error)))) + place
