"""Configuration files: our flat names in YAML, and mlx-lm's nested ones as aliases (see `mlx_lm_config`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from .. import inputs
from ..errors import RequestError, quote
from ..wording import did_you_mean, flag
from . import mlx_lm_config
from .options import TrainOptions
from .options.values import conform, field_types

Options = TypeVar("Options", bound=TrainOptions)

# Keys about the model, which a file may have beside the options.
MODEL_KEYS = ("model", "tokenizer", "config_yaml", "revision", "dtype", "chat_template")

# Keys of mlx-lm's files (all versions since 2024) that are not offered here: values that are accepted because they have
# no effect, and what to do instead of other values.
_NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hf_dataset": ((), "name the data set in data"),
    "trust_remote_code": ((False,), "no code of a model's repository is run here"),
    "clear_cache_threshold": ((0,), "in Python, call mx.set_cache_limit before finetune"),
    "config": ((), "a file cannot name another one; give --config on the command line"),
    "text_feature": (("text",), "name the column text"),
    "prompt_feature": (("prompt",), "name the column prompt"),
    "completion_feature": (("completion",), "name the column completion"),
    "chat_feature": (("messages",), "name the column messages"),
    "lora_layers": ((), "it is called num_layers"),
    "use_dora": ((False,), "write fine_tune_type: dora"),
    "adapter_file": ((), "write adapter_path, which is a folder"),
    "wandb": ((), "write report_to: wandb, and its value as project_name"),
    "wand": ((), "write report_to: wandb, and its value as project_name"),
}
# Pairs of keys that set the same thing.
_RIVALS = (("alpha", "scale"), ("iters", "epochs"))
_SPELLINGS = (("sample_prompt", "sample_prompts"),)
# Keys that are lists, and may be a single text.
_LISTS = ("sample_prompts", "reward_regex")
# Keys that decide what other keys mean.
_OWNERS = ("optimizer", "fine_tune_type")
_OF_LORA = ("target_modules", "rank", "alpha", "scale", "use_rslora", "dropout", "adapter_format")
_OF_OPTIMIZER = ("weight_decay", "beta1", "beta2", "eps", "momentum", "bias_correction")
_OF_SCHEDULE = ("min_learning_rate", "decay_steps")


class Merged(NamedTuple, Generic[Options]):
    """What `merge` made: the options of a run, its model keys, and the values among both that the file gave."""

    options: Options
    model: dict[str, Any]
    from_file: dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, unchanged; `1e-5` is a number.

    Raises:
        RequestError: the file cannot be read, is not YAML, or does not hold keys with values.
    """
    values = inputs.read_yaml(path, _loader())
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(f"{path} must hold keys with values, like `rank: 8`.")
    return values


def merge(
    options: type[Options],
    file_values: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    model_keys: tuple[str, ...] = MODEL_KEYS,
    place: str = "The configuration file",
) -> Merged[Options]:
    """The options of a run and its model keys: flags override the file, which overrides the defaults.

    If a flag chooses another optimizer, schedule or kind of fine-tuning, the file's settings for its own are ignored. A
    null in the file means that the key is not set.

    Args:
        options: the dataclass to make; its values are not checked yet.
        file_values: as `read` returns them.
        flags: those that were given, by field or by model key.
        model_keys: the keys to accept beside the options.
        place: what messages call the file.

    Raises:
        RequestError: an unknown key, one that is not offered, a value of the wrong type, or two that exclude each
            other.
    """
    types = {**{key: str | None for key in model_keys}, **field_types(options)}
    values = {key: value for key, value in file_values.items() if value is not None}
    values = _respelled(_offered(values, place), place)
    # Pretraining has no adapters.
    known = [*types, *(key for key in mlx_lm_config.KEYS if key != "lora_parameters" or "rank" in types)]
    for key in values.keys() - set(known):
        raise RequestError(f"{place} has an unknown key {quote(key)}; {_hint(key, known, options.command)}")
    values |= {key: _conform(types[key], key, values[key], place) for key in _OWNERS if key in values}
    given = {key: value for key, value in flags.items() if value is not None}
    if "optimizer" in values and given.get("optimizer", values["optimizer"]) != values["optimizer"]:
        values = {key: value for key, value in values.items() if key not in _OF_OPTIMIZER}
    chosen = {key: given.get(key) or values.get(key) or _default(options, key) for key in _OWNERS}
    values = mlx_lm_config.flatten(values, place, **chosen)
    flat = {key: _conform(types[key], key, value, place) for key, value in values.items()}
    _check_rivals(flat, f"{place} has both {{}} and {{}}, which set the same thing; keep one.")
    _check_rivals(given, "{} and {} set the same thing; give one of them.", flag)
    from_file = {key: value for key, value in _without_overruled(flat, given).items() if key not in given}
    merged = from_file | given
    found = {key: merged.pop(key) for key in model_keys if key in merged}
    return Merged(options(**merged), found, from_file)


def with_place(error: RequestError, from_file: Mapping[str, Any], place: str) -> RequestError:
    """The error with a sentence about which of the settings that it names, by flag or value, came from a file.

    Args:
        from_file: the settings that did, as in `Merged`.
        place: what the sentence calls the file.
    """
    message = str(error)
    settings = dict(_flat(from_file))
    names = [key for key in settings if _names(key, message)]
    # "X must be Y, got Z" names its setting, and the values Y and Z may be other settings' too.
    if not names or ", got " not in message:
        names = [key for key, value in settings.items() if key in names or _is_named(value, message)]
    if not names:
        return error
    return type(error)(f"{message} {' and '.join(names)} {'is' if len(names) == 1 else 'are'} set in {place}.")


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings with a model's sizes one by one: `model.head_dim`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", None) for name in value)
        else:
            yield key, value


def _names(key: str, message: str) -> bool:
    """Whether a message names a setting: by its flag, or `model.name` as "model's name", `model.head_dim` as such."""
    owner, _, name = key.partition(".")
    if not name:
        return _is_named(flag(key), message)
    return _is_named(f"{owner}'s {name}", message) or ("_" in name and _is_named(name, message))


def _is_named(what: Any, message: str) -> bool:
    """Whether a message has this text as a word of its own."""
    return isinstance(what, str) and re.search(rf"(?<![\w/-]){re.escape(what)}(?![\w/-])", message) is not None


def to_dict(options: TrainOptions) -> dict[str, Any]:
    """The options as plain values for JSON and YAML; `merge` turns them into the same options.

    `iters` is left out when `epochs` is set.
    """
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    if options.epochs is not None:
        del values["iters"]
    return values


def _loader() -> Any:
    """A safe YAML loader that reads 1e-5 as a number, as in YAML 1.2, and rejects duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if any(count > 1 for count in keys.values()):
            key = keys.most_common(1)[0][0]
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key}", node.start_mark)
        loader.flatten_mapping(node)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    number = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def _offered(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values without keys that are not offered here, which are refused unless they have no effect."""
    for key, (harmless, instead) in _NOT_OFFERED.items():
        if key in values and values[key] not in harmless:
            raise RequestError(f"{place} has {key}, which is not offered; {instead}.")
    return {key: value for key, value in values.items() if key not in _NOT_OFFERED}


def _respelled(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`sample_prompt`, the name of the flag, becomes `sample_prompts`; a single text becomes a list."""
    flat = dict(values)
    if "sample_prompt" in flat:
        _check_rivals(flat, f"{place} has both {{}} and {{}}, which set the same thing; keep one.", pairs=_SPELLINGS)
        flat["sample_prompts"] = flat.pop("sample_prompt")
    return flat | {key: [flat[key]] for key in _LISTS if isinstance(flat.get(key), str)}


def _hint(key: Any, known: list[str], command: str) -> str:
    """Known keys that are similar to an unknown one."""
    return did_you_mean(str(key).replace("-", "_"), known) or f"see `mlx-openelm {command} --help` for the names."


def _conform(kind: Any, key: str, value: Any, place: str) -> Any:
    # `kind` is str for a loss_type that cannot be combined.
    if key in ("target_modules", "loss_type", "reward_funcs") and isinstance(value, str) and kind is not str:
        value = [name.strip() for name in value.split(",") if name.strip()]
    try:
        return conform(kind, value)
    except ValueError as expected:
        quotes = "; put it in quotes" if str(expected) == "text" and not isinstance(value, dict | list) else ""
        raise RequestError(f"{place}: {key} must be {expected}, got {quote(value)}{quotes}.") from None


def _default(options: type[TrainOptions], name: str) -> Any:
    return next((field.default for field in fields(options) if field.name == name), None)


def _check_rivals(
    values: Mapping[str, Any], message: str, name: Any = str, pairs: tuple[tuple[str, str], ...] = _RIVALS
) -> None:
    for pair in pairs:
        if all(key in values for key in pair):
            raise RequestError(message.format(*map(name, pair)))


def _without_overruled(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values without those that these flags override or make meaningless."""
    overruled: set[str] = set()
    for one, other in _RIVALS:
        overruled |= {other} if one in flags else set()
        overruled |= {one} if other in flags else set()
    if flags.get("fine_tune_type") == "full":
        overruled |= set(_OF_LORA)
    if flags.get("lr_schedule") == "constant":
        overruled |= set(_OF_SCHEDULE)
    if flags.get("warmup") == 0:
        overruled.add("warmup_init")
    if "scale" in flags:
        overruled.add("use_rslora")
    if flags.get("resume"):
        overruled.add("resume_adapter_file")  # the run has started from it already
    return {key: value for key, value in values.items() if key not in overruled}
