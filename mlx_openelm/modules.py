"""Get and replace parts of a model by their dotted path."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .model import OpenELM


def module_at(parent: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below `parent`; the empty path is `parent` itself.

    Raises:
        KeyError, IndexError: there is no such module.
    """
    for name in filter(None, path.split(".")):
        parent = parent[int(name)] if isinstance(parent, list) else parent[name]
    return parent


def replace_at(parent: nn.Module, path: str, part: nn.Module | mx.array) -> None:
    """Replace the module or parameter at a dotted path below `parent`."""
    above, _, name = path.rpartition(".")
    setattr(module_at(parent, above), name, part)


def output_layer(model: OpenELM) -> nn.Module:
    """The layer that gives the logits: `lm_head`, or the embedding if it is shared."""
    return model.transformer.token_embeddings if model.config.share_input_output_layers else model.lm_head
