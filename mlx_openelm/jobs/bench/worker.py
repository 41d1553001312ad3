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
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ... import backend, blas, errors
from ...config import EMBEDDING, HEAD, NORM
from ...errors import OpenELMError
from ...version import __version__

_EMBEDDING, _HEAD = f"{EMBEDDING}.", f"{HEAD}."


class Ours:
    """mlx-openelm: its own decoding loop, without text."""

    version = __version__

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from ...generation.options import CacheOptions
        from ...loading import load

        self.model, _ = load(settings["model"], **settings["loading"])
        self._options, self._step_size = CacheOptions(**settings["caches"]), settings["prefill_step_size"]

    def start(self, prompt: list[int], count: int) -> tuple[Iterator[Any], list[Any]]:
        """The tokens after a prompt, one by one, and the caches that they will be in."""
        from ...generation.decoding import decode, make_decoder

        decoder, ids, count = make_decoder(self.model, prompt, count, self._options)
        return decode(decoder, ids, count, prefill_step_size=self._step_size), decoder.cache

    def settle(self) -> None:
        """Wait for work that was queued."""
        mx.synchronize()


class MlxLm:
    """mlx-lm: its own model and its `generate_step`."""

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

    def start(self, prompt: list[int], count: int) -> tuple[Iterator[Any], list[Any]]:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model, max_kv_size=self._options.get("max_kv_size"))
        return generate_step(mx.array(prompt), self.model, max_tokens=count, prompt_cache=cache, **self._options), cache

    def settle(self) -> None:
        from mlx_lm.generate import generation_stream

        mx.synchronize()
        mx.synchronize(generation_stream)


def run(program: Ours | MlxLm, prompt: list[int], count: int) -> dict[str, Any]:
    """Generate tokens; returns the fields of `timings.Run`."""
    mx.reset_peak_memory()
    started = time.perf_counter()
    tokens, cache = program.start(prompt, count)
    times = [time.perf_counter() - started for _ in tokens]
    program.settle()
    return {
        "times": times,
        "peak_memory": mx.get_peak_memory(),
        "position_bytes": position_bytes(cache),
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
    """Bytes of weights that decoding reads per token: all, but of an embedding that is not the head only a row."""
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
                    answer = run(program, request["prompt"], request["count"])
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
