"""The errors for NaN and infinity. Callers check numbers that they read back from the device anyway, or write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from .errors import OpenELMError

if TYPE_CHECKING:
    import mlx.nn as nn

_ADVICE = "download the model, or convert the original, again"


def not_finite(what: str, model: nn.Module, *, processed: bool = False) -> OpenELMError:
    """The error for `what` not being finite, with a likely cause and advice; looks through the model's weights.

    Args:
        processed: whether logits processors (a bias, penalties) changed the model's logits.
    """
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    floating = [(name, value) for name, value in parameters if mx.issubdtype(value.dtype, mx.floating)]
    damaged = next((name for name, value in floating if not is_finite(value)), None)
    if damaged is not None:
        cause = f"{damaged} holds NaN or infinity, so its file is damaged; {_ADVICE}"
    elif processed:
        cause = "the logits processors ruled out every token, or the one chosen, or the model's weights are damaged"
    elif any(value.dtype == mx.float16 for _, value in floating):
        cause = "float16 cannot hold what this model computes; use --dtype bfloat16 or float32"
    else:
        cause = f"its weights are far too large, as in a damaged file; {_ADVICE}"
    return OpenELMError(f"{what} not finite: {cause}.")


def is_finite(values: mx.array) -> bool:
    """Whether no value is NaN or infinite."""
    # NaN and infinity reach the sum, which takes no memory and little time; a sum of large values may overflow.
    return bool(mx.isfinite(values.sum()).item()) or bool(mx.all(mx.isfinite(values)).item())


def check_finite(weight: mx.array, name: str, what: str) -> None:
    """Refuse a weight whose damage would not be seen in what is written.

    Args:
        name: of the tensor, for the message.
        what: what cannot be done with it: `quantized`.

    Raises:
        OpenELMError: it holds NaN or infinity.
    """
    if is_finite(weight):
        return
    cause = f"its file is damaged; {_ADVICE}"
    if weight.dtype == mx.float16:
        cause = f"float16 cannot hold it, or its file is damaged; use --dtype bfloat16, or {_ADVICE}"
    raise OpenELMError(f"{name} holds NaN or infinity and cannot be {what}: {cause}.")
