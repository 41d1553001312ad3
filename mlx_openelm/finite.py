"""The error for NaN and infinity. Callers check numbers that they read back from the device anyway."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from .errors import OpenELMError
from .model import OpenELM

_ADVICE = "download the model, or convert the original, again"


def not_finite(what: str, model: OpenELM, *, processed: bool = False) -> OpenELMError:
    """The error for `what` not being finite, with a likely cause and advice; looks through the model's weights.

    Args:
        processed: whether logits processors (a bias, penalties) changed the model's logits.
    """
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    floating = [(name, value) for name, value in parameters if mx.issubdtype(value.dtype, mx.floating)]
    damaged = next((name for name, value in floating if not mx.all(mx.isfinite(value)).item()), None)
    if damaged is not None:
        cause = f"{damaged} holds NaN or infinity, so its file is damaged; {_ADVICE}"
    elif processed:
        cause = "the logits processors ruled out every token, or the one chosen, or the model's weights are damaged"
    elif any(value.dtype == mx.float16 for _, value in floating):
        cause = "float16 cannot hold what this model computes; use --dtype bfloat16 or float32"
    else:
        cause = f"its weights are far too large, as in a damaged file; {_ADVICE}"
    return OpenELMError(f"{what} not finite: {cause}.")
