"""Flags that more than one command has, and flags made from the fields of a dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..hub import catalog
from .parsing import Parser, Switch, integer, number

# What argparse converts a value with, and how `--help` writes it.
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"action": Switch, "metavar": "True|False"},
    int: {"type": integer, "metavar": "N"},
    float: {"type": number, "metavar": "NUMBER"},
    str: {"metavar": "TEXT"},
}
_REPEATABLE: dict[str, Any] = {"action": "append", "metavar": "TEXT"}

DTYPES = "float32|float16|bfloat16"
_SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODEL",
        "default": catalog.TINY,
        "help": "A name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a .pt or .gguf file.  "
        "[default: %(default)s]",
    },
    "--adapter-path": {
        "action": "append",
        "metavar": "PATH",
        "help": "An adapter: a folder, a file, a hub repository, or corenet:270M/lora. Repeat it as PATH=WEIGHT to mix "
        "LoRA adapters.",
    },
    "--tokenizer": {"metavar": "PATH", "help": "A tokenizer file or folder to use instead of the model's own."},
    "--config-yaml": {
        "metavar": "FILE",
        "help": "The training configuration of a CoreNet checkpoint; published sizes need none.",
    },
    "--revision": {"metavar": "NAME", "help": "A branch, tag or commit on the hub."},
    "--dtype": {"metavar": DTYPES, "help": "The type to compute in; by default the one that suits the device."},
    "--expand": {
        "action": Switch,
        "metavar": "True|False",
        "help": "Unpack quantized weights at load, or keep them packed. By default they are unpacked only on a CPU "
        "without our kernels, while memory allows.",
    },
    "--exact-activations": {
        "action": "store_true",
        "help": "On a CPU, do not round the activations that quantized weights are multiplied with; by default they "
        "are rounded to 8 bits if the weights have 6 or less.",
    },
    "--overwrite": {"action": "store_true", "help": "Replace the output if it exists."},
    "--json": {"action": "store_true", "help": "Print one JSON object."},
    "--debug": {"action": "store_true", "help": "Show the traceback of an error."},
    "--help": {"action": "help", "help": "Show this help."},
}


def add_shared(group: Any, *names: str) -> None:
    """Add these of the flags that commands share."""
    for name in names:
        group.add_argument(name, **_SHARED[name])


def add_packing(group: Any) -> None:
    """The flags of a command that can also pack or unpack a model."""
    group.add_argument("--quantize", "-q", action="store_true", help="Pack every matrix into few bits.")
    group.add_argument("--q-bits", type=integer, metavar="N", help="Bits per weight; affine: 4 by default.")
    group.add_argument(
        "--q-group-size", type=integer, metavar="N", help="Weights that share a scale; affine: 64 by default."
    )
    group.add_argument(
        "--q-mode", metavar="affine|mxfp4|nvfp4|mxfp8", default="affine", help="The packing.  [default: %(default)s]"
    )
    group.add_argument(
        "--recipe",
        "--quant-predicate",
        metavar="mixed_2_6|mixed_3_4|mixed_3_6|mixed_4_6",
        help="With -q, more bits for the matrices that need them.",
    )
    group.add_argument("--dequantize", "-d", action="store_true", help="Unpack a quantized model.")


def packing(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_packing`'s flags."""
    names = ("quantize", "q_bits", "q_group_size", "q_mode", "recipe", "dequantize")
    return {name: getattr(args, name) for name in names}


def add_fields(parser: Parser, options: type) -> None:
    """A flag for each field of a dataclass, with the field's name, help and group (see `options.option`).

    A flag that was not typed leaves no value behind, so that the dataclass, or a configuration file, supplies it.
    """
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        about, kind = field.metadata, hints[field.name]
        if get_origin(kind) in (Union, UnionType):  # int | None
            kind, *others = (part for part in get_args(kind) if part is not NoneType)
            kind = None if others else kind
        settings = dict(_TYPES.get(kind, _REPEATABLE))
        if about["metavar"]:
            settings["metavar"] = about["metavar"]
        shown = "on" if field.default is True else field.default
        has_default = shown is not None and shown is not False and shown != ()
        parser.group(about["group"]).add_argument(
            f"--{field.name.replace('_', '-')}",
            *about["flags"],
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{about['help']}  [default: {shown}]" if has_default else about["help"],
            **settings,
        )


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass whose flags were typed; those that may be repeated as tuples."""
    values = vars(args)
    found = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
