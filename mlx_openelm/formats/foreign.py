"""Folders that are not readable models, and what to say about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote

# What programs call a download until it is complete.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
_PICKLED = (".bin", ".ckpt", ".pkl", ".pickle")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# What other quantization methods store in a matrix's place, by the ending of the name.
_PARTS = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".W_q": "HQQ",
}


def no_config(folder: Path) -> RequestError:
    """Why a folder without `config.json` is no model."""
    from .adapter import FILES

    if any((folder / name).exists() for name in FILES):
        return RequestError(
            f"{folder} holds no config.json: it is an adapter. Give it with --adapter-path, and the model it was "
            "trained on with --model."
        )
    return RequestError(f"{folder} holds no config.json, so it is no model; give the folder that holds one.")


def no_weights(folder: Path) -> RequestError:
    """Why a folder without `model*.safetensors` cannot be read."""
    from .adapter import FILES

    names = sorted(file.name for file in folder.iterdir())
    names = [name for name in names if name not in _NO_WEIGHTS and not name.startswith(".")]
    advice = (
        (_UNFINISHED, "an unfinished download: download the folder again"),
        (_PICKLED, "which is pickled, could run code and is never read: save the weights as safetensors"),
        ((".gguf", ".pt", ".pth"), "which is a file of its own: give it in place of the folder"),
    )
    for endings, what in advice:
        found = next((name for name in names if name.lower().endswith(endings)), None)
        if found is not None:
            return RequestError(f"{folder} holds no model*.safetensors file, but {quote(found)}, {what}.")
    if any(name in FILES for name in names):
        what = "it is an adapter. Give it with --adapter-path, and the model it was trained on with --model"
        return RequestError(f"{folder} holds no model*.safetensors file: {what}.")
    other = next((name for name in names if name.endswith(".safetensors")), None)
    hint = "" if other is None else f" ({quote(other)} is not read under that name)"
    return RequestError(f"{folder} holds no model*.safetensors file{hint}.")


def check_method(file: Path, values: Mapping[str, Any]) -> None:
    """Raises RequestError if `file`, a `config.json` with these values, says that another method packed the weights."""
    settings = values.get("quantization_config")
    if isinstance(values.get("quantization"), dict) or not isinstance(settings, dict):
        return  # MLX's own entry, which goes first in mlx-lm, too
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers reads its first configurations
    if method is not None:
        raise _packed(file, quote(method).strip("'"))


def check_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raises RequestError if the tensors' names are those of another method's packed weights."""
    for name in names:
        method = next((method for ending, method in _PARTS.items() if name.endswith(ending)), None)
        if method is not None:
            raise _packed(folder, f"{method} ({quote(name)})")


def _packed(place: Path, method: str) -> RequestError:
    return RequestError(
        f"{place}: the weights are quantized by {method}, which is not read. Take the model it was made from, and "
        "quantize that with mlx-openelm quantize, or convert -q."
    )
