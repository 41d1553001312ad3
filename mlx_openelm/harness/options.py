"""The options of `evaluate`, for the command line and Python."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

from ..errors import RequestError, quote
from ..evaluation.likelihoods import DEFAULT_BATCH_SIZE
from ..generation.options import check_number
from ..inputs import read_json, to_path
from ..options import Option, Options, paths_as_text
from ..wording import flag, one_of

SUITES = ("zero_shot", "openllm", "llm360", "commonsense", "risk", "memorization")
MODES = ("paper", "current")
# Suites that need no lm-eval, and the options that are only for its tasks.
OWN_PROMPTS = ("commonsense", "memorization")
_MOST_SEED = 2**32 - 1  # NumPy's, with which lm-eval draws
_OF_LM_EVAL = (
    *("num_fewshot", "include_path", "apply_chat_template", "chat_template", "fewshot_as_multiturn"),
    *("system_instruction", "gen_kwargs"),
)


@dataclass(frozen=True, repr=False)
class EvaluateOptions(Options):
    """What is measured, and how.

    Attributes:
        tasks: names of tasks; with a suite, those of the suite to run.
        samples: question numbers by task, instead of `limit`.
        gen_kwargs: arguments of generated answers, as `name=value`.
        seed: of the examples that are drawn for a prompt, and of sampled texts.
    """

    suite: Annotated[
        str | None,
        Option("Tasks that belong together: Apple's three tables, CoreNet's fine-tuning tasks, risks.",
               metavar="|".join(SUITES)),
    ] = None  # fmt: skip
    tasks: Annotated[
        Sequence[str],
        Option("Tasks to run: any of lm-eval's, or some of the suite's. Several with commas.", metavar="LIST"),
    ] = ()
    data: Annotated[
        str | None,
        Option(
            "Folder with data sets: as on the hub (FOLDER/owner/name), or as in LLM-Adapters "
            "(FOLDER/openbookqa/test.json). What is not there is downloaded.",
            metavar="FOLDER",
        ),
    ] = None
    limit: Annotated[int | None, Option("Ask the first N questions of each task.", default="all")] = None
    output: Annotated[
        str | None,
        Option("File for the result; answers are kept beside it, so that a stopped run goes on.", metavar="FILE"),
    ] = None
    mode: Annotated[
        str,
        Option(
            "The suites' tasks as Apple ran them, or as they are in lm-eval now.",
            group="Tasks",
            metavar="paper|current",
        ),
    ] = "paper"
    num_fewshot: Annotated[
        int | None,
        Option(
            "Examples in front of each question.",
            group="Tasks",
            flags=("--num-shots",),
            default="the suite's, or the task's",
        ),
    ] = None
    samples: Annotated[
        str | None,
        Option(
            'Questions to ask, by number: {"openbookqa": [0, 7]}, or a file with that.', group="Tasks", metavar="JSON"
        ),
    ] = None
    include_path: Annotated[
        str | None, Option("Folder with further tasks as YAML files of lm-eval.", group="Tasks", metavar="FOLDER")
    ] = None
    seed: Annotated[
        int, Option("Seed of the examples that are drawn for prompts, and of sampled texts.", group="Tasks")
    ] = 1234
    apply_chat_template: Annotated[bool, Option("Write prompts as a chat.", group="Prompt")] = False
    chat_template: Annotated[
        str | None,
        Option(
            "How to write chats as text; implies --apply-chat-template.",
            group="Prompt",
            metavar="corenet|plain|FILE",
            default="the tokenizer's own, else corenet",
        ),
    ] = None
    fewshot_as_multiturn: Annotated[
        bool | None,
        Option("In a chat, write each example as turns of its own, as lm-eval does.", group="Prompt", default="on"),
    ] = None
    system_instruction: Annotated[str | None, Option("Text in front of each prompt.", group="Prompt")] = None
    gen_kwargs: Annotated[
        Sequence[str],
        Option("Arguments for tasks with generated answers: temperature=0.8,max_gen_toks=64, or a JSON object.",
               group="Sampling", metavar="NAME=VALUE"),
    ] = ()  # fmt: skip
    batch_size: Annotated[
        str | int,
        Option("Choices or texts to process together; auto is the default.", group="Measuring", metavar="N"),
    ] = DEFAULT_BATCH_SIZE
    max_length: Annotated[
        int | None,
        Option("Most tokens of a prompt and its answer.", group="Measuring", default="those the model was trained on"),
    ] = None
    log_samples: Annotated[
        bool, Option("Also write every question with its prompts and answers, into FILE.samples.jsonl.", group="Output")
    ] = False

    def __post_init__(self) -> None:
        paths_as_text(self)
        for name, choices in (("suite", SUITES), ("mode", MODES)):
            if (value := getattr(self, name)) is not None and value not in choices:
                raise RequestError(f"--{name} must be {one_of(choices)}, got {quote(value)}.")
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", (self.tasks,))
        object.__setattr__(self, "batch_size", batch_size(self.batch_size))
        if self.suite is None and not self.task_names:
            raise RequestError("There is nothing to run: give a --suite, or some --tasks.")
        for name, least in (("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None:
                check_number(flag(name), value, least, math.inf, f"{least} or more", kind=Integral)
        check_number("--seed", self.seed, 0, _MOST_SEED, f"0 to {_MOST_SEED}", kind=Integral)
        if self.limit is not None and self.samples is not None:
            raise RequestError("--limit and --samples exclude each other.")
        if self.log_samples and self.output is None:
            raise RequestError("--log-samples needs --output.")
        if self.fewshot_as_multiturn and not self.as_chat:
            raise RequestError("--fewshot-as-multiturn needs --apply-chat-template.")
        if self.suite in OWN_PROMPTS:
            for name in _OF_LM_EVAL:
                if getattr(self, name) not in (None, False, ()):
                    raise RequestError(
                        f"--suite {self.suite} has prompts of its own, without --{name.replace('_', '-')}."
                    )
        for name in ("data", "include_path"):
            if (value := getattr(self, name)) is not None and not to_path(value).is_dir():
                raise RequestError(f"--{name.replace('_', '-')} must be a folder; {value} is none.")

    @property
    def task_names(self) -> list[str]:
        """The names in `tasks`, of which each text may have several with commas."""
        names = (name.strip() for text in self.tasks for name in text.split(","))
        return list(dict.fromkeys(name for name in names if name))

    @property
    def as_chat(self) -> bool:
        """Whether prompts are written as a chat."""
        return self.apply_chat_template or self.chat_template is not None

    @property
    def data_folder(self) -> Path | None:
        return None if self.data is None else to_path(self.data)

    @property
    def chosen(self) -> dict[str, list[int]]:
        """The numbers of the questions to ask, by task, from `samples`.

        Raises:
            RequestError: it is not a JSON object of lists of numbers.
        """
        if self.samples is None:
            return {}
        try:
            is_text = self.samples.lstrip().startswith(("{", "["))
            values = json.loads(self.samples) if is_text else read_json(to_path(self.samples))
        except ValueError as error:
            if isinstance(error, RequestError):
                raise
            values = None
        if not isinstance(values, dict) or not all(map(_are_numbers, values.values())):
            raise RequestError('--samples must be an object of lists of numbers, like {"openbookqa": [0, 7]}.')
        return {name: list(dict.fromkeys(numbers)) for name, numbers in values.items()}

    @property
    def generation(self) -> dict[str, Any]:
        """The arguments in `gen_kwargs`, of which each text may have several with commas, or is a JSON object.

        Raises:
            RequestError: one has no value, or an object is not JSON.
        """
        texts = (self.gen_kwargs,) if isinstance(self.gen_kwargs, str) else self.gen_kwargs
        found: dict[str, Any] = {}
        for text in (text for text in texts if text.lstrip().startswith("{")):
            try:
                found |= json.loads(text)
            except ValueError as error:
                raise RequestError(f"--gen-kwargs is not JSON: {error}.") from None
        pairs = [text for text in texts if not text.lstrip().startswith("{")]
        for part in (part for text in pairs for part in text.split(",") if part.strip()):
            name, equals, value = part.partition("=")
            if not equals:
                raise RequestError(f"--gen-kwargs needs name=value, got {quote(part)}.")
            try:
                found[name.strip()] = json.loads(value.lower() if value in ("True", "False") else value)
            except ValueError:
                found[name.strip()] = value
        return found


def _are_numbers(value: Any) -> bool:
    """Whether a value is a list of question numbers, one at least."""
    numbers = isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
    return numbers and bool(value)


def batch_size(value: int | str | None) -> int:
    """The number that `--batch-size` means; lm-eval's `auto`, and `auto:4`, are the default.

    Raises:
        RequestError: it is neither.
    """
    if value is None or (isinstance(value, str) and value.partition(":")[0] == "auto"):
        return DEFAULT_BATCH_SIZE
    try:
        size = int(value)
    except ValueError:
        raise RequestError(f"--batch-size must be a whole number or auto, got {quote(value)}.") from None
    if size < 1:
        raise RequestError(f"--batch-size must be 1 or more, got {size}.")
    return size
