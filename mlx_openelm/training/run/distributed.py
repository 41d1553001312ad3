"""Data-parallel training: several processes, started by `mlx.launch`, that do one run together.

Each takes its share of every batch, and the gradients are summed, so the results are those of a single process, to
rounding. Only rank 0 writes and prints. When a process dies its connections close, and the others fail.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterator

import mlx.core as mx

from ...errors import OpenELMError, RequestError

# The backends' errors begin like this when a peer has died.
_LOST = ("[ring]", "[jaccl]", "[mpi]", "[nccl]", "distributed")


class Processes:
    """The processes of a run; without `mlx.launch` there is only one."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum over all processes, exact for whole numbers below 2**24 in each."""
        if self.size == 1:
            return value
        return float(mx.distributed.all_sum(mx.array(float(value)), group=self.group, stream=mx.cpu).item())  # type: ignore[arg-type]

    def any(self, value: bool) -> bool:
        """Whether `value` is true in at least one process."""
        return value if self.size == 1 else self.sum(value) > 0

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        most = mx.distributed.all_max(mx.array(value), group=self.group, stream=mx.cpu).item()
        assert isinstance(most, int)
        return most

    def share(self, text: str | None) -> str:
        """The leading process's text, in all processes; the other processes' texts are ignored."""
        if self.size == 1:
            assert text is not None
            return text
        data = (text or "").encode() if self.leads else b""
        length = int(self.sum(len(data)))
        own = mx.array(list(data) if self.leads else [0] * length, dtype=mx.int32)
        values: list[int] = mx.distributed.all_sum(own, group=self.group, stream=mx.cpu).tolist() if length else []  # type: ignore[assignment]
        return bytes(values).decode()

    def share_tensors(self, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        """The leading process's tensors, bit for bit; all processes' tensors have the same names and shapes."""
        if self.size == 1:
            return tensors
        shared = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            # As bytes: adding zeros keeps every bit.
            parts = mx.contiguous(tensor.reshape(-1)).view(mx.uint8)
            parts = parts if self.leads else mx.zeros_like(parts)
            total = mx.distributed.all_sum(parts, group=self.group, stream=mx.cpu)
            shared[name] = total.view(tensor.dtype).reshape(tensor.shape)
            mx.eval(shared[name])
        return shared

    def check_equal(self, what: str, text: str) -> None:
        """Refuse a run whose processes have different requests.

        Raises:
            RequestError: `text` is not the same in all processes.
        """
        if self.size == 1:
            return
        own = mx.array(list(hashlib.sha256(text.encode()).digest()), dtype=mx.int32)
        rows = mx.distributed.all_gather(own[None], group=self.group, stream=mx.cpu)
        if not mx.all(rows == own).item():
            raise RequestError(f"The {self.size} processes have different {what}; start all with the same.")

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch size that cannot be divided evenly.

        Raises:
            RequestError: it is not a multiple of the number of processes.
        """
        if batch_size % self.size:
            raise RequestError(
                f"--batch-size {batch_size} cannot be shared by {self.size} processes; "
                f"take a multiple of {self.size}, such as {-(-batch_size // self.size) * self.size}."
            )

    def ignore_termination(self) -> None:
        """Before an error: ignore SIGTERM, with which mlx.launch ends all processes, until the error is printed."""
        if self.size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context for work that all processes do, in which every failure becomes a one-line error.

        Raises:
            OpenELMError: another process is gone. Errors of processes that do not lead name their rank.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not str(error).startswith(_LOST):
                raise
            self.ignore_termination()
            raise OpenELMError(
                f"{self._me()}another process of the run is gone, so it ended ({error}); start it again with --resume."
            ) from None
        except OpenELMError as error:
            if self.leads:
                raise
            raise type(error)(f"{self._me()}{error}") from None

    def _me(self) -> str:
        return "" if self.leads else f"Process {self.rank}: "
