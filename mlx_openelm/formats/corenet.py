"""What CoreNet, Apple's training library, writes: `.pt` checkpoints with a YAML, and the folders of its MLX port.

Names are Hugging Face's without `transformer.`. Training pads the vocabulary (32000 tokens to 32128 rows), so the
embedding has rows that belong to no token: `cut_vocabulary` drops them once the tokenizer is known.
"""

from __future__ import annotations

import importlib.util
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import inputs
from ..config import SIZES, ModelConfig
from ..errors import RequestError
from ..inputs import read_json
from . import mlx as mlx_format
from . import raw, safetensors
from .mlx import Checkpoint
from .raw import Span
from .weights import Tensor, Weights

_EMBEDDING = "transformer.token_embeddings"
_HEAD = "lm_head"
_CORENET_HEAD = "classifier"  # where the output layer is not shared with the embedding
_DTYPES = {"torch.float32": mx.float32, "torch.float16": mx.float16, "torch.bfloat16": mx.bfloat16}
_PUBLISHED = ", ".join(f"OpenELM-{size}" for size in SIZES)
_NEEDED_SIZES = ("num_transformer_layers", "model_dim", "head_dim")
# Full training checkpoints keep the weights under these, the first before the second.
_STATE_KEYS = ("model_state_dict", "ema_model_state_dict")


def read(path: Path, config_yaml: Path | None = None) -> tuple[Checkpoint, int]:
    """The model in a `.pt` file, and how many tokens its configuration speaks of.

    The checkpoint's vocabulary is still the padded one. No weight is read yet, unless the file was written by
    a PyTorch older than 1.6. Nothing in the file is run.

    Args:
        config_yaml: the training configuration; without it the sizes must be those of a published model.

    Raises:
        RequestError: PyTorch is missing, the file is damaged, holds code or an adapter, or does not fit
            its configuration.
    """
    section = None if config_yaml is None else read_yaml(config_yaml)
    tensors = read_tensors(path)
    adapter = next((name for name in tensors if ".lora_" in name or ".base_layer." in name), None)
    if adapter is not None:
        raise RequestError(
            f"{path} holds a LoRA or DoRA adapter ({adapter}): give it with --adapter-path, and the checkpoint "
            "it was trained on with --model."
        )
    infos = {
        hub_name(name): safetensors.TensorInfo(dtype_of(path, name, tensor), tuple(tensor.shape), path)
        for name, tensor in tensors.items()
    }
    if section is None:
        config, pieces = _published_config(path, infos)
    else:
        config, pieces = config_from_section(section, str(config_yaml))
    mlx_format.check(path, config, {}, infos, described_by=str(config_yaml or "a published model"))
    weights = read_lazily(path, tensors)
    return Checkpoint(config, Weights({hub_name(name): weight for name, weight in weights.items()})), pieces


def read_port(folder: Path) -> tuple[Checkpoint, int]:
    """The model in a folder of CoreNet's MLX port, plain or quantized, and how many tokens its configuration speaks of.

    `weights.safetensors` and `config.json`, which is the YAML's section about the model, with `quantization` beside it.
    The checkpoint's vocabulary is still the padded one. No weight is read yet.

    Raises:
        RequestError: damaged files, or weights that do not fit the configuration.
    """
    file, weight_file = folder / "config.json", folder / "weights.safetensors"
    section = read_json(file)
    config, pieces = config_from_section(section, str(file))
    infos = {hub_name(name): info for name, info in safetensors.read_header(weight_file).items()}
    quantization = mlx_format.read_quantization(file, config, section, infos)
    mlx_format.check(folder, config, quantization, infos)
    weights = safetensors.read_lazily([weight_file])
    named = {hub_name(name): weight for name, weight in weights.items()}
    return Checkpoint(config, Weights.of_arrays(named), quantization), pieces


def cut_vocabulary(checkpoint: Checkpoint, size: int) -> None:
    """Keep the first `size` rows of the embedding, and of an output layer of its own; nothing is read yet."""
    if size == checkpoint.config.vocab_size:
        return
    checkpoint.config = replace(checkpoint.config, vocab_size=size)
    checkpoint.weights = Weights(
        {
            name: _first_rows(tensor, size) if name.rpartition(".")[0] in (_EMBEDDING, _HEAD) else tensor
            for name, tensor in checkpoint.weights.tensors().items()
        }
    )


def _first_rows(tensor: Tensor, size: int) -> Tensor:
    return Tensor(tensor.dtype, (size, *tensor.shape[1:]), lambda: tensor.read()[:size])


# Configurations.


def read_yaml(path: Path) -> dict[str, Any]:
    """The section `model.language_modeling.general_gpt` of a training configuration.

    Raises:
        RequestError: the file is missing, or it is no YAML, or has no such section.
    """
    values = inputs.read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        raise RequestError(f"{path} has no model.language_modeling.general_gpt, which describes an OpenELM model.")
    return values


def config_from_section(section: Mapping[str, Any], place: str) -> tuple[ModelConfig, int]:
    """The model that a `general_gpt` section describes, its vocabulary padded, and how many tokens are real.

    Published models are named (`model_name: OpenELM-270M`), others spell their sizes out under the names of
    `ModelConfig`. `padding_index` is the first id beyond the tokenizer's.

    Raises:
        RequestError: an unknown name without sizes, or values that cannot be right.
    """
    name = section.get("model_name")
    known = {field.name for field in fields(ModelConfig)}
    values: dict[str, Any] = {key: value for key, value in section.items() if key in known and value is not None}
    try:
        if isinstance(name, str) and name.lower().removeprefix("openelm-").upper().replace(".", "_") in SIZES:
            base = ModelConfig.from_name(name).to_dict()
            if values.keys() & {*_NEEDED_SIZES, "num_gqa_groups", "qkv_multipliers", "ffn_multipliers"}:
                base = {key: value for key, value in base.items() if key not in ("num_query_heads", "num_kv_heads")}
            values = base | values
        elif any(key not in values for key in _NEEDED_SIZES):
            raise RequestError(
                f"model_name is {name!r}, which is none of {_PUBLISHED}, and {', '.join(_NEEDED_SIZES)} are not given"
            )
        if "rope_max_length" not in section and "max_context_length" in values:
            # The published models were trained on half the length their positions were made for.
            context = values["max_context_length"]
            values["rope_max_length"] = 2 * context if isinstance(context, int) else context
        config = ModelConfig.from_dict(values)
    except RequestError as error:
        raise RequestError(f"{place}: {str(error).rstrip('.')}.") from None
    padding = section.get("padding_index")
    is_beyond = isinstance(padding, int) and 0 < padding <= config.vocab_size
    return config, padding if is_beyond else config.vocab_size  # type: ignore[return-value]


def _published_config(path: Path, infos: Mapping[str, safetensors.TensorInfo]) -> tuple[ModelConfig, int]:
    """The published model that has tensors of these shapes, whatever its vocabulary was padded to."""
    embedding = infos.get(f"{_EMBEDDING}.weight")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    shapes = {name: info.shape for name, info in infos.items()}
    for size in SIZES:
        published = ModelConfig.from_name(size)
        shared = f"{_HEAD}.weight" not in infos
        config = replace(published, vocab_size=max(rows, 1), share_input_output_layers=shared)
        if config.tensor_shapes() == shapes:
            return config, min(rows, published.vocab_size)
    raise RequestError(
        f"{path} is none of {_PUBLISHED} by its tensors' shapes; give its training configuration with --config-yaml."
    )


# Tensors.


def hub_name(name: str) -> str:
    """Hugging Face's name of a CoreNet tensor."""
    path, _, part = name.rpartition(".")
    return f"{_HEAD}.{part}" if path == _CORENET_HEAD else f"transformer.{name}"


def dtype_of(path: Path, name: str, tensor: Any) -> mx.Dtype:
    """MLX's type of a torch tensor, which `path` holds under `name`.

    Raises:
        RequestError: a type that weights do not have.
    """
    kind = str(tensor.dtype)
    if kind not in _DTYPES:
        kinds = ", ".join(known.removeprefix("torch.") for known in _DTYPES)
        raise RequestError(f"{path} stores {name} as {kind.removeprefix('torch.')}; expected {kinds}.")
    return _DTYPES[kind]


def read_tensors(path: Path, **options: Any) -> dict[str, Any]:
    """The torch tensors in a `.pt` file by CoreNet's names; by default without values (on torch's meta device).

    Of a full training checkpoint, the model's. `options` are those of `torch.load`. Nothing in the file is run.

    Raises:
        RequestError: PyTorch is missing, the file is damaged, or holds more than tensors by name.
    """
    state = _torch_load(path, **({"map_location": "meta"} | options))
    for key in _STATE_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    is_tensor = {name: hasattr(value, "untyped_storage") for name, value in state.items()} if _is_named(state) else {}
    if not is_tensor or not all(is_tensor.values()):
        odd = [name for name, fits in is_tensor.items() if not fits]
        what = f" ({', '.join(odd[:4])} are no tensors)" if odd else ""
        raise RequestError(f"{path} is no CoreNet checkpoint: it is not a dictionary of tensors by name{what}.")
    return dict(state)


def _is_named(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(name, str) for name in state)


def _torch_load(path: Path, **options: Any) -> Any:
    try:
        import torch
    except ImportError:
        raise _missing_torch() from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version, which the errors below tell better
            with torch.serialization.safe_globals(_numpy_scalars()):
                return torch.load(path, weights_only=True, **options)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|unsupported class (\S+)", str(error), re.IGNORECASE)
        asked = f"asks for {found[1] or found[2]}" if found else "is damaged, or holds more than plain tensors"
        raise RequestError(
            f"{path} is refused: it {asked}, and what is no tensor could run code. Download it again, "
            "or save the weights alone, with torch.save(model.state_dict(), ...)."
        ) from None
    # What damaged files bring PyTorch to raise is of every kind: KeyError, EOFError, RuntimeError, AssertionError.
    except Exception:
        raise _damaged(path) from None


def _numpy_scalars() -> list[Any]:
    """What builds NumPy numbers, which training checkpoints can hold beside the weights (a best metric): harmless."""
    try:
        import numpy as np
        from numpy._core.multiarray import scalar
    except ImportError:
        return []
    kinds = (np.float64, np.float32, np.int64)
    return [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _damaged(path: Path) -> RequestError:
    return RequestError(f"{path} is damaged, or no PyTorch checkpoint of plain tensors: download it again.")


def require_torch() -> None:
    """Ask before a download whether a `.pt` file could be read.

    Raises:
        RequestError: PyTorch is missing.
    """
    if importlib.util.find_spec("torch") is None:
        raise _missing_torch()


def _missing_torch() -> RequestError:
    return RequestError("Reading CoreNet's .pt files needs PyTorch: pip install 'mlx-openelm[corenet]'.")


def read_lazily(path: Path, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Some of a file's tensors, as `read_tensors` gives them, to be read when they are used.

    From where they lie in the file; those that do not lie there as they are (transposed, or compressed) by PyTorch.
    """
    is_plain = _is_plain_archive(path)
    spans = {name: span for name, tensor in tensors.items() if is_plain and (span := _span(tensor)) is not None}
    weights = raw.tensors(path, spans)
    if len(spans) < len(tensors):
        loaded = read_tensors(path, map_location="cpu", mmap=is_plain)
        weights |= {name: _of_torch(loaded[name]) for name in tensors if name not in spans}
    return {name: weights[name] for name in tensors}


def _span(tensor: Any) -> Span | None:
    """Where a tensor's values lie in its file; None where PyTorch does not tell, or where they are not in order."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        return None
    offset = start + tensor.storage_offset() * tensor.element_size()
    return Span(_DTYPES[str(tensor.dtype)], tuple(tensor.shape), offset)


def _is_plain_archive(path: Path) -> bool:
    """Whether the values lie in the file as they are: a zip archive, not compressed, little-endian."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [name for name in archive.namelist() if name.endswith("/byteorder")]
            return all(archive.read(name) == b"little" for name in orders) and all(
                member.compress_type == zipfile.ZIP_STORED for member in archive.infolist()
            )
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        UnicodeDecodeError,
    ):  # a file of an old PyTorch, or one that only it can read
        return False


def _of_torch(tensor: Any) -> Tensor:
    return Tensor(_DTYPES[str(tensor.dtype)], tuple(tensor.shape), lambda: _to_mlx(tensor))


def _to_mlx(tensor: Any) -> mx.array:
    """The values of a torch tensor in an array of their own."""
    import torch

    values = tensor.detach().contiguous()
    if values.dtype == torch.bfloat16:  # numpy has no such type
        return mx.array(values.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(values.numpy())
