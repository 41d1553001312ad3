"""Which parameters are trained: a new adapter, an existing one, or the model's own weights."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from ...adapters.attaching import attach, attach_new, target_paths
from ...adapters.files import read_adapter
from ...config import EMBEDDING, ModelConfig
from ...errors import RequestError, command_or_call
from ...formats.adapter import Adapter
from ...model import OpenELM
from ..options import FineTuneOptions


def make_trainable(model: OpenELM, options: FineTuneOptions) -> None:
    """Freeze a model except for what is trained; first attach a new adapter, or the one in a file, if one is trained.

    Full fine-tuning trains everything, or only the layers or matrices that the options choose. It trains embedding and
    norms only with everything.

    Raises:
        RequestError: more layers than the model has; an adapter file that cannot be read, or does not fit the options.
    """
    file = options.resume_adapter_file
    adapter = None if file is None else read_adapter(file, model.config)
    if options.fine_tune_type == "full":
        _unfreeze(model, options)
        if adapter is not None:
            _start_from_weights(model, adapter, str(file))
    elif adapter is not None:
        _check_like(adapter, options, model.config, str(file))
        # Use exactly the scale that --resume would use later.
        scale = options.lora_scale
        modules = {path: replace(change, scale=scale) for path, change in adapter.modules.items()}
        attach(model, replace(adapter, modules=modules, dropout=options.dropout))
    else:
        attach_new(
            model,
            target_modules=options.target_modules,
            num_layers=options.num_layers,
            rank=options.rank,
            scale=options.lora_scale,
            dropout=options.dropout,
            dora=options.fine_tune_type == "dora",
            seed=options.seed,
        )


def count(model: OpenELM) -> tuple[int, int]:
    """The number of trained parameters, and of all parameters."""
    trained = _trained(model)
    own = model.config.tensor_shapes()
    added = sum(value.size for name, value in trained.items() if name not in own)
    return sum(value.size for value in trained.values()), model.config.num_parameters + added


def _trained(model: OpenELM) -> dict[str, mx.array]:
    return dict(tree_flatten(model.trainable_parameters()))  # type: ignore[arg-type]


def _unfreeze(model: OpenELM, options: FineTuneOptions) -> None:
    model.freeze()
    if options.target_modules is not None:
        paths = set(target_paths(model.config, options.target_modules, options.num_layers))
        for path, module in model.named_modules():
            if path in paths:
                module.unfreeze(recurse=False)
    elif options.num_layers == -1:
        model.unfreeze()
    else:
        for layer in model.layers[-options.num_layers :]:
            layer.unfreeze()


def _start_from_weights(model: OpenELM, adapter: Adapter, file: str) -> None:
    if adapter.modules:
        raise RequestError(
            f"--resume-adapter-file {file} holds a low-rank adapter, which --fine-tune-type full cannot go on from; "
            f"fuse it into the model first, with {command_or_call('`mlx-openelm fuse`', '`fuse`')}."
        )
    trained = _trained(model)
    for name, weight in adapter.weights.items():
        if name not in trained:
            raise RequestError(
                f"--resume-adapter-file {file} changes {name}, which is not trained now; give the same --num-layers."
            )
        if weight.shape != model.config.tensor_shapes()[name]:
            raise RequestError(f"--resume-adapter-file {file} does not fit the model: {name} has another shape.")
    model.load_weights(list(adapter.weights.items()), strict=False)
    mx.eval(model.parameters())


def _check_like(adapter: Adapter, options: FineTuneOptions, config: ModelConfig, file: str) -> None:
    """Refuse an adapter whose layers, ranks or scales differ from the options: `run.json` would be wrong."""

    def refuse(what: str) -> RequestError:
        return RequestError(f"--resume-adapter-file {file} {what}.")

    if adapter.weights:
        raise refuse("contains whole weights; continue with --fine-tune-type full")
    expected = set(target_paths(config, options.target_modules, options.num_layers))
    if adapter.modules.keys() != expected:
        names = sorted({path.rpartition(".")[2] for path in adapter.modules})
        layers = {path.split(".")[2] for path in adapter.modules if path != EMBEDDING}
        raise refuse(
            f"changes {', '.join(names)} in {len(layers)} layers; give the --target-modules and --num-layers it has"
        )
    for path, change in adapter.modules.items():
        if (change.magnitude is not None) != (options.fine_tune_type == "dora"):
            kind = "lora" if change.magnitude is None else "dora"
            raise refuse(f"is of another type; give --fine-tune-type {kind}")
        if change.output_side and (config.share_input_output_layers or change.magnitude is not None):
            raise refuse(
                f"changes the output layer by {path} as well, as mlx-lm's do; here its input side alone is trained"
            )
        if change.rank != options.rank:
            raise refuse(f"has rank {change.rank} in {path}; give --rank {change.rank}")
        if abs(change.scale - options.lora_scale) > 1e-6 * abs(change.scale):
            scale = f"{change.scale:g}"
            raise refuse(f"has scale {scale} in {path}, not {options.lora_scale:g}; give --scale {scale}")
