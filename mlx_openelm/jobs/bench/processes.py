"""The programs of a benchmark: each loads the model in a process of its own, `worker`, and waits for its turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ... import errors
from ...errors import OpenELMError, RequestError
from ...evaluation.timings import Run
from ...generation.options import CacheOptions
from ...loading import dtype_name
from ...sources import Source, is_port
from ..convert import convert
from .options import MLX_LM, OURS, BenchOptions

_PACKAGES = Path(__file__).parents[3]
_PIECE = 1 << 24  # bytes of a file to read at a time


@contextlib.contextmanager
def programs(
    source: Source, draft: Source | None, options: BenchOptions, loading: Mapping[str, Any]
) -> Iterator[list[Process]]:
    """The programs to measure, with the model loaded; their processes end with the block.

    Args:
        draft: the draft model.
        loading: the keyword arguments of `load`.

    Raises:
        RequestError, OpenELMError: a program cannot load the model, or the adapter.
    """
    caches = {item.name: getattr(options, item.name) for item in fields(CacheOptions)}
    ours: dict[str, Any] = {
        "program": OURS,
        "model": source.name,
        "caches": caches,
        "prefill_step_size": options.prefill_step_size,
        "draft_model": None if draft is None else draft.name,
        "drafting": {"num_draft_tokens": options.num_draft_tokens, "prompt_lookup": options.prompt_lookup},
        "loading": {**loading, "dtype": dtype_name(loading["dtype"])},
    }
    with contextlib.ExitStack() as stack:
        adapter = None
        if loading["adapter_path"] is not None:
            from ...adapters.switching import read_mixture

            adapter = read_mixture(loading["adapter_path"], source.checkpoint.config)  # downloads what is missing
        settings = [ours]
        if options.compare is not None:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-openelm-bench-")))
            settings.append(_for_mlx_lm(source, draft, ours, adapter, temporary))
        for opened in (source, draft):
            if opened is not None:
                _read(opened.path)
        yield [stack.enter_context(Process(its)) for its in settings]


def _for_mlx_lm(
    source: Source, draft: Source | None, ours: dict[str, Any], adapter: Any, temporary: Path
) -> dict[str, Any]:
    """The settings of mlx-lm for the same files. `ours` are changed if a model must be converted, which both read."""
    adapter_folder, loading = None, ours["loading"]
    opened_with = {name: loading[name] for name in ("tokenizer", "config_yaml", "revision")}
    folder = _folder_for_both(source, temporary / "model", **opened_with)
    if folder != source.path:
        ours |= {"model": str(folder), "loading": loading | dict.fromkeys(opened_with)}
    draft_folder = None if draft is None else _folder_for_both(draft, temporary / "draft")
    if draft_folder is not None:
        ours["draft_model"] = str(draft_folder)
    if adapter is not None:
        from ...formats import mlx_adapter

        adapter_folder = temporary / "adapter"
        adapter_folder.mkdir()
        mlx_adapter.write(adapter, adapter_folder, source.config)
    return {
        "program": MLX_LM,
        "model": str(folder),
        "caches": ours["caches"],
        "head_dim": source.config.head_dim,
        "prefill_step_size": ours["prefill_step_size"],
        "draft_model": None if draft_folder is None else str(draft_folder),
        "drafting": ours["drafting"],
        "dtype": loading["dtype"],
        "adapter_path": None if adapter_folder is None else str(adapter_folder),
    }


def _folder_for_both(source: Source, converted: Path, **opened_with: Any) -> Path:
    """The folder of a model that mlx-lm reads: its own, or a converted one."""
    if _mlx_lm_reads(source.path):
        return source.path
    convert(source.name, converted, dtype=str(source.checkpoint.dtype).removeprefix("mlx.core."), **opened_with)
    return converted


def _mlx_lm_reads(path: Path) -> bool:
    """Whether mlx-lm finds the model's weights there: it takes `model*.safetensors` in a folder."""
    return path.is_dir() and not is_port(path) and any(path.glob("model*.safetensors"))


def _read(path: Path) -> None:
    """Read the model's files once: from then on they are in the system's cache, for every program alike."""
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with contextlib.suppress(OSError), file.open("rb", buffering=0) as opened:  # its program will say it better
            while opened.read(_PIECE):
                pass


class Process:
    """A program that has loaded the model, in its process; see `turns.Program`. Use it in a `with` block."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.name = str(settings["program"])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",  # everything is here
        }
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=environment,
                process_group=0,  # Ctrl-C must reach only the parent, which prints what was measured
            )
        except OSError as error:
            self._complaints.close()
            raise OpenELMError(f"No process for {self.name} could be started: {error.strerror}.") from None
        try:
            facts = self._ask({**settings, "names_flags": errors.names_flags})
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - started
        self.version, self.dtype, self.blas = str(facts["version"]), str(facts["dtype"]), str(facts["blas"])
        self.weight_bytes, self.process_memory = float(facts["weight_bytes"]), int(facts["process_memory"])

    def run(self, prompts: Sequence[Sequence[int]], count: int, drafts: bool = False) -> Run:
        """Generate `count` tokens after each of the prompts, together, greedily and beyond the end of the text."""
        answer = self._ask({"prompts": [list(prompt) for prompt in prompts], "count": count, "drafts": drafts})
        self.process_memory = int(answer.pop("process_memory"))
        return Run(len(prompts[0]), **answer)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            OpenELMError: the program failed; a `RequestError` if it refused the request.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise OpenELMError(f"{self.name} ended unexpectedly: {self._last_words()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise (RequestError if answer["exit_code"] == RequestError.exit_code else OpenELMError)(answer["error"])
        return answer

    def _last_words(self) -> str:
        """Why the process ended: the signal that killed it, or the last line it wrote."""
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "it was killed, as happens when there is too little memory"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").split("\n")
        return next((line.strip().rstrip(".") for line in reversed(lines) if line.strip()), f"exit status {status}")

    def close(self) -> None:
        """End the process, even while it computes."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
