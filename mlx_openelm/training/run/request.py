"""One call of `finetune`: what it was asked to do, and the checks that need nothing loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...adapters.files import check_adapter_folder, find_local
from ...errors import RequestError, name_options
from ...hub import catalog
from ...inputs import to_path
from ...loading import check_dtype
from ...text.chat_template import find_template
from ..options import FineTuneOptions, TrainOptions
from ..step import compact
from . import folder as run_folder
from .distributed import Processes
from .listener import Listener
from .preparing import Loading


class RunRequest(Protocol):
    """What resuming needs of a request for any kind of training."""

    @property
    def options(self) -> TrainOptions: ...
    @property
    def processes(self) -> Processes: ...
    @property
    def listener(self) -> Listener: ...


_DEFAULT_FOLDER = FineTuneOptions().adapter_path


@dataclass(frozen=True)
class Request:
    """The arguments of `finetune`, and the processes that serve it.

    Args:
        model: as `load` takes it.
        listener: of the leading process; the others' does nothing.
    """

    model: str
    options: FineTuneOptions
    loading: Loading
    overwrite: bool
    processes: Processes
    listener: Listener

    @property
    def folder(self) -> Path:
        return to_path(self.options.adapter_path)

    @property
    def tests_adapter(self) -> bool:
        """Whether there is an adapter to test: a named one, or the default folder if it exists."""
        path = self.options.adapter_path
        return path != "" and (path != _DEFAULT_FOLDER or self.folder.exists())


def check(request: Request) -> dict[str, Any] | None:
    """Refuse a request that cannot work, as far as that can be known before loading.

    Returns:
        the record of the run to continue, in the process that leads; None for a new run.

    Raises:
        RequestError: it names the flag.
    """
    options = request.options
    options.check()
    request.processes.check_batch(options.batch_size)
    check_dtype(request.model, request.loading.dtype)
    if options.train:
        compact.check_dtype(options, request.loading.dtype)
    if request.loading.chat_template is not None:
        find_template(request.loading.chat_template)
    previous = _check_folder(request) if options.train and request.processes.leads else None
    if options.resume_adapter_file is not None and _is_missing(options.resume_adapter_file):
        raise RequestError(f"--resume-adapter-file {options.resume_adapter_file} does not exist.")
    if request.overwrite and not options.train:
        raise RequestError("--overwrite replaces a run with a new one; it needs --train.")
    if not options.train and request.tests_adapter and _is_missing(options.adapter_path):
        raise RequestError(
            f"There is no adapter in {options.adapter_path}; give --adapter-path the folder that holds one, "
            "or '' to test the base model."
        )
    if not options.train and request.tests_adapter and (folder := find_local(options.adapter_path)) is not None:
        check_adapter_folder(folder)
    return previous


def _check_folder(request: Request) -> dict[str, Any] | None:
    """Check the folder to train into; returns the record of the run in it if that is to be continued."""
    run_folder.check_folder(request.folder, resume=request.options.resume, overwrite=request.overwrite)
    if not request.options.resume:
        return None
    previous = run_folder.read_run(request.folder, request.options.command)
    loading = dataclasses.asdict(request.loading)
    for change in run_folder.compare(
        request.model, request.options, loading, previous, request.folder / run_folder.RUN
    ):
        request.listener.warn(name_options(f"{change}; from here on the run differs from one that never stopped."))
    return previous


def _is_missing(path: str) -> bool:
    """Whether a path does not exist and cannot be the name of a hub repository either."""
    if find_local(path) is not None or catalog.corenet_name(path) is not None:
        return False
    owner, _, name = path.partition("/")
    return not name or "/" in name or not owner.strip(".~") or Path(path).suffix in (".safetensors", ".pt")
