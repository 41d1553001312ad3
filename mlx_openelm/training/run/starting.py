"""What pretraining starts from: a new model by name or by its sizes, an existing one, or a CoreNet run's checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...config import SIZES, ModelConfig
from ...errors import RequestError, quote
from ...formats import corenet, corenet_training
from ...formats.corenet_training import TrainingState
from ...formats.packing import cast_weights
from ...formats.safetensors import streaming
from ...hub import catalog
from ...inputs import to_path
from ...jobs.writing import origin_of
from ...model import OpenELM
from ...publishing.origin import Origin
from ...sources import find_tokenizer, named_tokenizer, open_source
from ...text import shared_tokenizer
from ...text.tokenizer import Tokenizer
from ...wording import did_you_mean
from ..step.initial_weights import initial_weights
from .folder import RUN
from .preparing import Loading

# The name of a published size or the model inside the package, a folder or file, or the sizes of a new model.
Model = str | Path | Mapping[str, Any] | ModelConfig

# What a model given by its sizes has unless it says otherwise, as all of OpenELM's have.
_FAMILY: dict[str, Any] = {
    "num_gqa_groups": 4,
    "qkv_multipliers": (0.5, 1.0),
    "ffn_multipliers": (0.5, 4.0),
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}
# What else tells its models apart; values of single layers follow from these.
_SHAPE = (
    *("num_transformer_layers", "model_dim", "head_dim", "ffn_dim_divisor"),
    *("max_context_length", "rope_max_length"),
)
_NAME = "name"


@dataclass
class Start:
    """The model, its tokenizer, and where training begins.

    Args:
        model: its vocabulary may be larger than the tokenizer's, by rows that belong to no token.
        description: a line that says what the model starts from.
        name: a short name for titles.
        origin: what is known about the model that is continued, or that a new one has no original; None for the
            checkpoint of a CoreNet run.
        training: the state of the CoreNet run that is continued; None for another start.
    """

    model: OpenELM
    tokenizer: Tokenizer
    description: str
    name: str
    origin: Origin | None = None
    training: TrainingState | None = None


def start(model: Model, loading: Loading, *, seed: int, max_seq_length: int) -> Start:
    """The model that `model` stands for, with float32 weights.

    Args:
        model: `270m`, `OpenELM-270M` and so on, or `tiny` and `tiny-draft`, mean new weights of that shape; so does a
            mapping of `ModelConfig`'s fields, which may begin with `name: 270m` or `name: tiny`. A folder, a
            file or another hub repository means its weights; a `training_checkpoint_*.pt` also the state of its
            optimizer.
        seed: of new weights.
        max_seq_length: the context of a new model that gives none.

    Raises:
        RequestError: an unknown name, invalid sizes, or a tokenizer that is missing or too large.
        OpenELMError: a download failed.
    """
    if isinstance(model, Mapping):
        return _from_sizes(model, loading, seed, max_seq_length)
    if isinstance(model, ModelConfig):
        return _new(model, _needed_tokenizer(loading), seed, "own sizes")
    if not isinstance(model, str | Path):
        raise RequestError(f"model must be a name, a path, or sizes by their names, got {quote(model)}.")
    is_local = os.path.exists(to_path(model))
    if not is_local and (str(model) in catalog.PACKAGED or catalog.find(str(model))):
        return _from_name(str(model), loading, seed)
    return _existing(model, loading)


def describe(model: Model) -> Any:
    """The model as `run.json` records it."""
    if isinstance(model, ModelConfig):
        return model.to_dict()
    return dict(model) if isinstance(model, Mapping) else str(model)


def _from_name(name: str, loading: Loading, seed: int) -> Start:
    """New weights in the shape of a published model or of one inside the package."""
    _refuse_file_settings(name, loading)
    if (packaged := catalog.PACKAGED.get(name)) is not None:
        config = ModelConfig.from_file(packaged)
        tokenizer = find_tokenizer(name, packaged, config, loading.tokenizer)
        return _new(replace(config, vocab_size=tokenizer.vocab_size), tokenizer, seed, name)
    release = catalog.find(name)
    assert release is not None
    config = ModelConfig.from_name(release.name)
    if loading.tokenizer is not None:
        tokenizer = _needed_tokenizer(loading)
        return _new(replace(config, vocab_size=tokenizer.vocab_size), tokenizer, seed, release.display_name)
    return _new(config, shared_tokenizer.find(release), seed, release.display_name)


def _from_sizes(sizes: Mapping[str, Any], loading: Loading, seed: int, max_seq_length: int) -> Start:
    """New weights in a shape of the user's own."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
    known = {entry.name for entry in fields(ModelConfig) if entry.init}
    for key in values:
        if key != _NAME and key not in known:
            hint = did_you_mean(str(key), [_NAME, *known])
            raise RequestError(f"The model has an unknown field {quote(key)}{hint and f'; {hint}'}")
    name: Any = values.pop(_NAME, None)
    own = {key: value for key, value in values.items() if value is not None}
    if name is not None:
        own = _shape_of(name) | own
    else:
        context = own.get("max_context_length", max_seq_length)
        rope = 2 * context if isinstance(context, int) else context
        own = {"max_context_length": context, "rope_max_length": rope} | own
    release = None if name is None else catalog.find(name)
    if loading.tokenizer is None and release is not None:
        tokenizer = shared_tokenizer.find(release)
    elif loading.tokenizer is None and name is not None:
        tokenizer = named_tokenizer(catalog.PACKAGED[name])
    else:
        tokenizer = _needed_tokenizer(loading)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = ModelConfig.from_dict(_FAMILY | {"vocab_size": tokenizer.vocab_size} | ids | own)
    return _new(config, tokenizer, seed, release.display_name if release is not None else name or "own sizes")


def _shape_of(name: Any) -> dict[str, Any]:
    """The fields in which a published size, or a model inside the package, differs from others of the family."""
    if isinstance(name, str) and name in catalog.PACKAGED:
        config = ModelConfig.from_file(catalog.PACKAGED[name])
    elif isinstance(name, str) and (release := catalog.find(name)) is not None:
        config = ModelConfig.from_name(release.name)
    else:
        known = ", ".join([*(size.replace("_", ".").lower() for size in SIZES), *catalog.PACKAGED])
        raise RequestError(f"The model's name must be one of {known}, got {quote(name)}.")
    return {field: getattr(config, field) for field in _SHAPE}


def _new(config: ModelConfig, tokenizer: Tokenizer, seed: int, name: str) -> Start:
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model only {config.vocab_size}; give a larger "
            "vocab_size, or another --tokenizer."
        )
    model = OpenELM(config, initialize=False)
    model.load_weights(list(initial_weights(config, seed).items()))
    mx.eval(model.parameters())
    count = f"{config.num_parameters / 1e6:,.1f}M parameters"
    line = f"The model is new: {name}, {count}, random weights of seed {seed}."
    return Start(model, tokenizer, line, name, Origin(f"{name}, trained from random weights", from_scratch=True))


def _existing(name: str | Path, loading: Loading) -> Start:
    """The weights of an existing model, and the optimizer's state of a CoreNet run."""
    path = to_path(name)
    is_checkpoint = path.suffix.lower() in (".pt", ".pth") and path.is_file()
    if is_checkpoint and corenet_training.has_training_state(path):
        return _corenet_run(path, loading)
    source = open_source(name, tokenizer=loading.tokenizer, config_yaml=loading.config_yaml, revision=loading.revision)
    if (rounding := source.checkpoint.rounding) is not None:
        raise RequestError(
            f"{name} is quantized to {rounding}, which is too coarse to train; `mlx-openelm convert --dequantize` "
            "unpacks it."
        )
    with source.reading():
        model = _load(source.checkpoint)
    origin = origin_of(source)
    if origin.base_model is not None:
        origin = replace(origin, relation="finetune")
    else:
        origin = replace(origin, name=_continued(origin, source.path))
    return Start(model, source.tokenizer, f"The model continues from the weights of {name}.", Path(name).name, origin)


def _continued(origin: Origin, path: Path) -> str:
    """What to call the origin of a local model that is continued; a model in the folder of a run has the run's name."""
    folder = path.resolve().parent
    name = folder.name if (folder / RUN).is_file() else path.name
    return f"continued from {name}" if origin.name == path.name else f"{origin.name}, continued from {name}"


def _corenet_run(path: Path, loading: Loading) -> Start:
    """A CoreNet run: its vocabulary stays padded, as its optimizer's state is."""
    yaml_file = None if loading.config_yaml is None else to_path(loading.config_yaml)
    checkpoint, pieces = corenet.read(path, yaml_file)
    unpadded = replace(checkpoint.config, vocab_size=pieces)
    tokenizer = find_tokenizer(path, path, unpadded, loading.tokenizer, rows=checkpoint.config.vocab_size)
    training = corenet_training.read(path)
    model = _load(checkpoint)
    line = f"The model continues the CoreNet run of {path}, from iteration {training.iteration:,} on."
    return Start(model, tokenizer, line, path.stem, training=training)


def _load(checkpoint: Any) -> OpenELM:
    """A model with the float32 weights of a checkpoint."""
    model = OpenELM(checkpoint.config, initialize=False)
    weights = cast_weights(checkpoint.weights, {}, mx.float32)
    loaded = []
    with streaming():
        for name in list(weights):
            loaded.append((name, weights.take(name)))
            mx.eval(loaded[-1][1])
    model.load_weights(loaded)
    return model


def _needed_tokenizer(loading: Loading) -> Tokenizer:
    if loading.tokenizer is None:
        raise RequestError(
            "--tokenizer is needed for a model of your own sizes: a file or folder, such as "
            "`mlx-openelm train-tokenizer` writes, or tiny."
        )
    return named_tokenizer(loading.tokenizer)


def _refuse_file_settings(name: str, loading: Loading) -> None:
    for flag, value in (("--config-yaml", loading.config_yaml), ("--revision", loading.revision)):
        if value is not None:
            raise RequestError(f"{flag} is for files; {name} means a new model with random weights.")
