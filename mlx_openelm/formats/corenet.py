"""The files of CoreNet, Apple's training library: `.pt` checkpoints with a YAML, and the folders of its MLX port.

Names are Hugging Face's without `transformer.`. Training pads the vocabulary (32000 tokens to 32128 rows), so the
embedding has rows that belong to no token: `cut_vocabulary` drops them once the tokenizer is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from .. import inputs
from ..config import EMBEDDING, HEAD, SIZES, ModelConfig
from ..errors import RequestError, quote
from ..inputs import read_json
from ..wording import one_of, some
from . import leftovers, safetensors, torch_file
from . import mlx as mlx_format
from .mlx import Checkpoint
from .safetensors import Tensor, Weights
from .torch_tensors import StoredTensor

_CORENET_EMBEDDING = "token_embeddings"
_CORENET_HEAD = "classifier"  # where the output layer is not shared with the embedding
Value = TypeVar("Value")
_PUBLISHED = tuple(f"OpenELM-{size}" for size in SIZES)
_NEEDED_SIZES = ("num_transformer_layers", "model_dim", "head_dim")
# Full training checkpoints keep the weights under one of these; the first one found is read.
_STATE_KEYS = ("model_state_dict", "ema_model_state_dict")
# Those of other trainers (PyTorch Lightning's, DeepSpeed's) do so under one of these.
_OTHER_STATE_KEYS = ("state_dict", "model", "module")
# PyTorch's wrappers insert these into names.
_WRAPPERS = re.compile(r"\b_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


def read(path: Path, config_yaml: Path | None = None) -> tuple[Checkpoint, int]:
    """The model in a `.pt` file, and the number of tokens in its configuration.

    The checkpoint's vocabulary is still the padded one. No weight is read yet, and nothing in the file is run.

    Args:
        config_yaml: the training configuration; without it the sizes must be those of a published model.

    Raises:
        RequestError: the file is damaged, contains code or an adapter, or does not match its configuration.
    """
    section = None if config_yaml is None else read_yaml(config_yaml)
    tensors = read_tensors(path)
    adapter = next((name for name in tensors if ".lora_" in name or ".base_layer." in name), None)
    if adapter is not None:
        raise RequestError(
            f"{path} contains a LoRA or DoRA adapter ({adapter}): give it with --adapter-path, and the checkpoint "
            "it was trained on with --model."
        )
    infos = {
        hub_name(name): safetensors.TensorInfo(torch_file.dtype_of(path, name, tensor), tensor.shape)
        for name, tensor in tensors.items()
    }
    if section is None:
        config, pieces = published_config(path, infos)
    else:
        config, pieces = config_from_section(section, str(config_yaml))
    described_by = str(config_yaml or "a published model")
    if config.share_input_output_layers and _has_copy(path, tensors, described_by):
        del tensors[f"{_CORENET_HEAD}.weight"], infos[f"{HEAD}.weight"]
    mlx_format.check(path, config, {}, infos, described_by)
    weights = torch_file.tensors(path, tensors)
    return Checkpoint(config, Weights({hub_name(name): weight for name, weight in weights.items()})), pieces


def _has_copy(path: Path, tensors: Mapping[str, StoredTensor], described_by: str) -> bool:
    """Whether a file repeats the embedding as a separate output layer; RequestError if they differ."""
    names = (f"{_CORENET_HEAD}.weight", f"{_CORENET_EMBEDDING}.weight")
    if any(name not in tensors for name in names):
        return False
    copy, own = torch_file.tensors(path, {name: tensors[name] for name in names}).values()
    leftovers.check_copy(path, names[0], copy.read(), own.read(), described_by)
    return True


def read_port(folder: Path) -> tuple[Checkpoint, int]:
    """The model in a folder of CoreNet's MLX port, plain or quantized, and the number of tokens in its configuration.

    `weights.safetensors` and `config.json`, which is the YAML's section about the model, with `quantization` beside it.
    The checkpoint's vocabulary is still the padded one. No weight is read yet.

    Raises:
        RequestError: damaged files, or weights that do not fit the configuration.
    """
    file, weight_file = folder / "config.json", folder / "weights.safetensors"
    section = read_json(file)
    config, pieces = config_from_section(section, str(file))
    tensors = {hub_name(name): tensor for name, tensor in safetensors.read_tensors([weight_file]).items()}
    quantization = mlx_format.read_quantization(file, config, section, tensors)
    mlx_format.check(folder, config, quantization, tensors)
    return Checkpoint(config, Weights(tensors), quantization), pieces


def cut_vocabulary(checkpoint: Checkpoint, size: int) -> None:
    """Keep the first `size` rows of the embedding, and of an untied output layer; nothing is read yet."""
    if size == checkpoint.config.vocab_size:
        return
    checkpoint.config = replace(checkpoint.config, vocab_size=size)
    checkpoint.weights = Weights(
        {
            name: _first_rows(tensor, size) if name.rpartition(".")[0] in (EMBEDDING, HEAD) else tensor
            for name, tensor in checkpoint.weights.tensors.items()
        }
    )


def _first_rows(tensor: Tensor, size: int) -> Tensor:
    return Tensor(tensor.dtype, (size, *tensor.shape[1:]), lambda: tensor.read()[:size])


# Configurations.


def read_yaml(path: Path) -> dict[str, Any]:
    """The section `model.language_modeling.general_gpt` of a training configuration.

    Raises:
        RequestError: the file is missing, is not YAML, or does not have the section.
    """
    values = inputs.read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        raise RequestError(
            f"{path} has no section model.language_modeling.general_gpt, so it does not describe an OpenELM model."
        )
    return values


def config_from_section(section: Mapping[str, Any], source: str) -> tuple[ModelConfig, int]:
    """The model that a `general_gpt` section describes, with its padded vocabulary, and the number of real tokens.

    Published models are named (`model_name: OpenELM-270M`); others give their sizes under the names of `ModelConfig`.
    `padding_index` is the first id beyond the tokenizer's.

    Args:
        source: the file that the section is from, for messages.

    Raises:
        RequestError: an unknown name without sizes, or invalid values.
    """
    name = section.get("model_name")
    known = {field.name for field in fields(ModelConfig) if field.init}
    values: dict[str, Any] = {key: value for key, value in section.items() if key in known and value is not None}
    try:
        if isinstance(name, str) and name.lower().removeprefix("openelm-").upper().replace(".", "_") in SIZES:
            base = ModelConfig.from_name(name).to_dict()
            if values.keys() & {*_NEEDED_SIZES, "num_gqa_groups", "qkv_multipliers", "ffn_multipliers"}:
                base = {key: value for key, value in base.items() if key not in ("num_query_heads", "num_kv_heads")}
            values = base | values
        elif any(key not in values for key in _NEEDED_SIZES):
            raise RequestError(
                f"Unknown model_name {quote(name)} (expected {one_of(_PUBLISHED)}), and {', '.join(_NEEDED_SIZES)} "
                "are missing"
            )
        if "rope_max_length" not in section and "max_context_length" in values:
            # The published models were trained with half of rope_max_length.
            context = values["max_context_length"]
            values["rope_max_length"] = 2 * context if isinstance(context, int) else context
        config = ModelConfig.from_dict(values)
    except RequestError as error:
        raise RequestError(f"{source}: {str(error).rstrip('.')}.") from None
    padding = section.get("padding_index")
    is_beyond = isinstance(padding, int) and 0 < padding <= config.vocab_size
    return config, padding if is_beyond else config.vocab_size  # type: ignore[return-value]


def published_config(path: Path, infos: Mapping[str, safetensors.TensorInfo]) -> tuple[ModelConfig, int]:
    """The published model with tensors of these shapes, whatever its vocabulary is padded to, and its real tokens."""
    embedding = infos.get(f"{EMBEDDING}.weight")
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    shapes = {name: info.shape for name, info in infos.items()}
    for size in SIZES:
        published = ModelConfig.from_name(size)
        shared = f"{HEAD}.weight" not in infos
        config = replace(published, vocab_size=max(rows, 1), share_input_output_layers=shared)
        if config.tensor_shapes() == shapes:
            return config, min(rows, published.vocab_size)
    raise RequestError(
        f"{path} does not have the tensor shapes of {one_of(_PUBLISHED)}; give its training configuration with "
        "--config-yaml."
    )


# Tensors.


def hub_name(name: str) -> str:
    """Hugging Face's name of a CoreNet tensor."""
    path, _, part = name.rpartition(".")
    return f"{HEAD}.{part}" if path == _CORENET_HEAD else f"transformer.{name}"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.pt` file by CoreNet's names, unread; of a full training checkpoint, the model's only.

    Raises:
        RequestError: the file is damaged, or contains more than tensors by name.
    """
    state = torch_file.read(path)
    if isinstance(state, dict):
        nested = [key for key in (*_STATE_KEYS, *_OTHER_STATE_KEYS) if isinstance(state.get(key), dict)]
        if nested and (nested[0] in _STATE_KEYS or len(nested) == 1):
            state = state[nested[0]]
    is_named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    is_tensor = {name: isinstance(value, StoredTensor) for name, value in state.items()} if is_named else {}
    if not is_tensor or not all(is_tensor.values()):
        odd = [name for name, fits in is_tensor.items() if not fits]
        what = f" (not tensors: {some(odd)})" if odd else ""
        raise RequestError(
            f"{path} is not a CoreNet checkpoint, a dictionary of tensors by name{what}; save the weights alone, with "
            "torch.save(model.state_dict(), ...)."
        )
    return plain_names(state)


def plain_names(state: Mapping[str, Value]) -> dict[str, Value]:
    """A model's parameters without what wrappers add to their names: PyTorch's own, and a prefix that all names share,
    such as `module.` of DistributedDataParallel or `model.` of Lightning."""
    plain = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    known = f"{_CORENET_EMBEDDING}."
    prefix = next((name.partition(known)[0] for name in plain if known in name), "")
    if len(plain) < len(state) or not all(name.startswith(prefix) for name in plain):
        return dict(state)
    return {name.removeprefix(prefix): value for name, value in plain.items()}
