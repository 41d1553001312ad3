"""The process that a benchmark times one program in: `processes` starts this module and talks to it.

In a process of its own, a program's memory and threads are not the other's, and starting it takes what it takes a user.
The first line of standard input describes the program and the model; each further one asks for a run. Every line is
answered with a JSON object on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ... import backend, blas, errors
from ...config import EMBEDDING, HEAD, NORM
from ...errors import OpenELMError, RequestError
from ...version import __version__
from ...wording import size

if TYPE_CHECKING:
    from ...generation.drafting import DraftCounts
    from ...generation.engine import Engine
    from ...generation.row import Row

_EMBEDDING, _HEAD = f"{EMBEDDING}.", f"{HEAD}."

Tokens = list[tuple[int, int]]  # that came together: the number of the row, and the token


class Started(NamedTuple):
    """The tokens after the prompts, the caches that those of the first prompt will be in, and counts of drafts."""

    steps: Iterator[Tokens]
    cache: list[Any]
    drafts: Sequence[DraftCounts] = ()


class Ours:
    """mlx-openelm: its own decoding loop, without text."""

    version = __version__

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from ...loading import load

        self.model, self._tokenizer = load(settings["model"], **settings["loading"])
        self._tokenizer.eos_token_ids = set()  # texts are as long as asked for
        self._caches, self._step_size = settings["caches"], settings["prefill_step_size"]
        self._drafting, self._draft_model = settings["drafting"], None
        if settings["draft_model"] is not None:
            from ...generation.draft_model import check_draft_model

            self._draft_model, tokenizer = load(settings["draft_model"], dtype=settings["loading"]["dtype"])
            check_draft_model(self.model, self._draft_model, self._tokenizer, tokenizer)

    def start(self, prompts: list[list[int]], count: int, drafts: bool = False) -> Started:
        return (
            self._alone(prompts[0], count) if len(prompts) == 1 and not drafts else self._rows(prompts, count, drafts)
        )

    def _alone(self, prompt: list[int], count: int) -> Started:
        from ...generation.decoding import decode, make_decoder
        from ...generation.options import CacheOptions

        decoder, ids, count = make_decoder(self.model, prompt, count, CacheOptions(**self._caches))
        steps = decode(decoder, ids, count, prefill_step_size=self._step_size)
        return Started(([(0, token)] for token, *_ in steps), decoder.cache)

    def _rows(self, prompts: list[list[int]], count: int, drafts: bool) -> Started:
        """As `batch_generate` does."""
        from ...generation.engine import Engine

        draft_model = self._draft_model if drafts else None
        engine = Engine(self.model, self._tokenizer, max_rows=len(prompts), draft_model=draft_model, prompts_first=True)
        options = self._caches | {"prefill_step_size": self._step_size} | (self._drafting if drafts else {})
        rows = [engine.submit(prompt, max_tokens=count, **options) for prompt in prompts]
        counts = [row.drafts for row in rows if row.drafts is not None]
        return Started(self._steps(engine, {row: n for n, row in enumerate(rows)}), rows[0].decoder.cache, counts)

    def _steps(self, engine: Engine, numbers: Mapping[Row, int]) -> Iterator[Tokens]:
        while engine.is_busy:
            pieces = engine.step()
            if engine.waiting:
                raise RequestError(
                    f"{len(numbers)} rows need more memory than the {size(engine.budget.max_bytes)} that they may "
                    "take; measure fewer with --batch, or set --max-kv-size or --kv-bits."
                )
            for row in numbers:
                if row.error is not None:
                    raise row.error
            if pieces:
                yield [(numbers[row], piece.token) for row, piece in pieces]

    def settle(self) -> None:
        """Wait for work that was queued."""
        mx.synchronize()


class MlxLm:
    """mlx-lm: its own model, its `generate_step`, its `BatchGenerator`, and its speculative decoding."""

    version = ""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from mlx_lm.utils import load_adapters, load_model

        self.version = version("mlx-lm")
        self.model, _ = load_model(Path(settings["model"]))
        if settings["adapter_path"] is not None:
            self.model = load_adapters(self.model, settings["adapter_path"])
            self.model.eval()
        if settings["dtype"] is not None:
            self.model.set_dtype(getattr(mx, settings["dtype"]))
            mx.eval(self.model.parameters())
        caches = settings["caches"]
        self._options = {name: value for name, value in caches.items() if value is not None}
        if caches["kv_bits"] is not None:
            self._options.setdefault("kv_group_size", min(64, settings["head_dim"]))
        if settings["prefill_step_size"] is not None:
            self._options["prefill_step_size"] = settings["prefill_step_size"]

        if settings["draft_model"] is not None:
            self._draft_model, _ = load_model(Path(settings["draft_model"]))
            if settings["dtype"] is not None:
                self._draft_model.set_dtype(getattr(mx, settings["dtype"]))
                mx.eval(self._draft_model.parameters())
        self._draft_tokens = settings["drafting"]["num_draft_tokens"] or 3  # as in its command

    def start(self, prompts: list[list[int]], count: int, drafts: bool = False) -> Started:
        if drafts:
            return self._drafted(prompts[0], count)
        if len(prompts) == 1:
            return self._alone(prompts[0], count)
        cache: list[Any] = []
        return Started(self._together(prompts, count, cache), cache)

    def _alone(self, prompt: list[int], count: int) -> Started:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model, max_kv_size=self._options.get("max_kv_size"))
        steps = generate_step(mx.array(prompt), self.model, max_tokens=count, prompt_cache=cache, **self._options)
        return Started(([(0, int(token))] for token, _ in steps), cache)

    def _drafted(self, prompt: list[int], count: int) -> Started:
        from mlx_lm.generate import speculative_generate_step
        from mlx_lm.models.cache import make_prompt_cache

        from ...generation.drafting import DraftCounts

        counts = DraftCounts()
        cache = make_prompt_cache(self.model)
        both = [*cache, *make_prompt_cache(self._draft_model)]
        options = self._options | {"num_draft_tokens": self._draft_tokens, "max_tokens": count, "prompt_cache": both}
        steps = speculative_generate_step(mx.array(prompt), self.model, self._draft_model, **options)
        return Started(self._counted(steps, count, counts), cache, [counts])

    def _counted(self, steps: Iterator[tuple[Any, Any, bool]], count: int, counts: DraftCounts) -> Iterator[Tokens]:
        """Its tokens. A step gives those drafted tokens that it accepts, then one of the model's own."""
        begins = True
        for token, _, from_draft in steps:
            if begins:
                counts.steps += 1
                counts.drafted += min(count - counts.tokens, self._draft_tokens)
            counts.tokens += 1
            counts.accepted += from_draft
            begins = not from_draft
            yield [(0, int(token))]

    def _together(self, prompts: list[list[int]], count: int, cache: list[Any]) -> Iterator[Tokens]:
        """As its `batch_generate` does. It makes caches as rows begin, so `cache` is filled at the end."""
        from mlx_lm.generate import BatchGenerator

        options = {name: self._options[name] for name in ("prefill_step_size", "max_kv_size") if name in self._options}
        generator = BatchGenerator(self.model, max_tokens=count, completion_batch_size=max(32, len(prompts)), **options)
        numbers = {uid: n for n, uid in enumerate(generator.insert(prompts))}
        while responses := generator.next_generated():
            yield [(numbers[response.uid], response.token) for response in responses]
            if numbers[responses[0].uid] == 0 and responses[0].prompt_cache is not None:
                cache += responses[0].prompt_cache
        generator.close()

    def settle(self) -> None:
        from mlx_lm.generate import generation_stream

        mx.synchronize()
        mx.synchronize(generation_stream)


def run(program: Ours | MlxLm, prompts: list[list[int]], count: int, drafts: bool = False) -> dict[str, Any]:
    """Generate tokens; returns the fields of `timings.Run` but the prompt's length, and the process's memory."""
    times: list[list[float]] = [[] for _ in prompts]
    mx.reset_peak_memory()
    started = time.perf_counter()
    work = program.start(prompts, count, drafts)
    for tokens in work.steps:
        moment = time.perf_counter() - started
        for row, _ in tokens:
            times[row].append(moment)
    program.settle()
    return {
        "times": times,
        "peak_memory": mx.get_peak_memory(),
        "position_bytes": position_bytes(work.cache),
        "drafted": sum(counts.drafted for counts in work.drafts),
        "accepted": sum(counts.accepted for counts in work.drafts),
        "steps": sum(counts.steps for counts in work.drafts),
        "step_tokens": sum(counts.tokens for counts in work.drafts),
        "process_memory": process_memory(),
    }


def facts(program: Ours | MlxLm) -> dict[str, Any]:
    """What `turns.Program` says of a program."""
    parameters = dict(tree_flatten(program.model.parameters()))
    return {
        "version": program.version,
        "dtype": str(parameters[f"{NORM}.weight"].dtype).removeprefix("mlx.core."),
        "blas": blas.state,
        "weight_bytes": weight_bytes(parameters),
        "process_memory": process_memory(),
    }


def weight_bytes(parameters: Mapping[str, mx.array]) -> int:
    """Bytes of weights that a step of decoding reads: all, but of an embedding that is not the head only a row."""
    has_head = any(name.startswith(_HEAD) for name in parameters)
    return sum(
        array.nbytes // array.shape[0] if has_head and name.startswith(_EMBEDDING) else array.nbytes
        for name, array in parameters.items()
    )


def position_bytes(cache: Sequence[Any]) -> float:
    """Bytes that caches of one sequence hold per position; their arrays are [1, K, T, D]."""
    leaves: Any = tree_flatten([layer.state for layer in cache])
    arrays = [leaf for _, leaf in leaves if isinstance(leaf, mx.array) and leaf.ndim == 4]
    return sum(array.nbytes / array.shape[2] for array in arrays)


def process_memory() -> int:
    """Bytes of memory that this process has held at most."""
    if sys.platform.startswith("linux"):  # where ru_maxrss starts from the parent's memory
        status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
        return int(status.split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def answers(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answer to each request; a failure is answered as `error`, with the `exit_code` that it means."""
    name, program = "", None
    for request in requests:
        try:
            if program is None:
                name, errors.names_flags = request["program"], request["names_flags"]
                program = (MlxLm if name == "mlx-lm" else Ours)(request)
                yield facts(program)
            else:
                with backend.wired_limit():
                    answer = run(program, request["prompts"], request["count"], request["drafts"])
                yield answer
        except OpenELMError as known:
            yield {"error": str(known), "exit_code": known.exit_code}
        except Exception as unexpected:
            doing = "load" if program is None else "run"
            reason = " ".join(str(unexpected).split()).rstrip(".")
            line = f"{name} could not {doing} the model: {type(unexpected).__name__}: {reason}."
            yield {"error": line, "exit_code": OpenELMError.exit_code}


def main() -> None:
    """Answer standard input until it ends."""
    warnings.simplefilter("ignore")  # the parent has said what matters
    answer_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a program prints is no answer
    for answer in answers(json.loads(line) for line in sys.stdin):
        print(json.dumps(answer), file=answer_stream, flush=True)


if __name__ == "__main__":
    main()
