"""Parts of a model by their dotted path, to look at and to replace."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .model import OpenELM


def module_at(parent: nn.Module, path: str) -> nn.Module:
    """The module of `parent` at a dotted path, `parent` itself at the empty one.

    Raises:
        KeyError, IndexError: there is none.
    """
    for name in filter(None, path.split(".")):
        parent = parent[int(name)] if isinstance(parent, list) else parent[name]
    return parent


def replace_at(parent: nn.Module, path: str, part: nn.Module | mx.array) -> None:
    """Put a module or a parameter in place of the one at a dotted path."""
    above, _, name = path.rpartition(".")
    setattr(module_at(parent, above), name, part)


def output_layer(model: OpenELM) -> nn.Module:
    """What gives the logits: `lm_head`, or the embedding where it is shared."""
    return model.transformer.token_embeddings if model.config.share_input_output_layers else model.lm_head
