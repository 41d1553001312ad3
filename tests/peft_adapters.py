"""A stand-in for the published PyTorch code, so that PEFT itself can create adapters and apply them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"


def change_tensors(source: Path, folder: Path, change: Callable[[dict[str, mx.array]], object]) -> Path:
    """A copy of an adapter's folder in which the tensors were changed."""
    shutil.copytree(source, folder)
    file = folder / "adapter_model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    change(tensors)
    file.unlink()
    mx.save_safetensors(str(file), tensors)
    return folder


def torch_base() -> Any:
    """Modules with the names of the published code; each can be called."""
    import torch

    root = torch.nn.Module()
    for name, weight in mx.load(str(FOLDER / "model.safetensors")).items():
        owner: Any = root
        *parents, last = name.removesuffix(".weight").split(".")
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner._modules[part]
        values = torch.from_numpy(np.array(weight))
        if last == "token_embeddings":
            owner.add_module(last, torch.nn.Embedding.from_pretrained(values))
        elif values.ndim == 2:
            linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
            linear.weight.data = values
            owner.add_module(last, linear)
    return root
