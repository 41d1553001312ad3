"""Damaged and hostile files of every format we read: good inputs, and mutations of them by seed."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_files import write_state

FIXTURES = Path(__file__).parent / "fixtures"
# Kinds of input: the function that reads one has the same name in fuzz_worker.py, up to the first dash.
KINDS = [
    "model-config",
    "model-weights",
    "model-packed",
    "model-index",
    "model-sentencepiece",
    "model-tokenizer",
    "model-settings",
    "model-gguf",
    "model-pt",
    "model-yaml",
    "model-port",
    "adapter-mlx",
    "adapter-peft",
    "adapter-pt",
    "data-jsonl",
    "data-gz",
    "data-parquet",
    "documents",
    "run",
    "sensitivities",
    "template",
]
# The file that is read in the folder of a kind, unless it is the folder itself.
TO_READ = {
    "model-gguf": "model.gguf",
    "model-pt": "checkpoint.pt",
    "model-yaml": "checkpoint.pt",
    "adapter-pt": "adapter.pt",
    "documents": "text.jsonl",
    "run": "run.yaml",
    "sensitivities": "sensitivities.json",
    "template": "template.jinja",
}

# Integers at the edges of what fits into 1, 2, 4 and 8 bytes.
EDGES = [0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1]
# Replacements of values in JSON or YAML; deep and long ones are written as text.
DEEP, LONG = "@deep@", "@long@"
VALUES: list[Any] = [
    None, True, False, "", "x", "x" * 5000, "a\x1b[2J\nb", "\ud800", [], {}, [[]], [None], {"": 0}, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), DEEP, LONG, ["x"] * 3000, *EDGES, -(2**31), -(2**63), 10**30,
]  # fmt: skip
TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 10**10**8 }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ lipsum(10**6) }}", "{{ '%1000000000d' % 1 }}", "{{ 'x'.center(10**9) }}", "{{ '{:1000000000}'.format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99].content }}", "{{ nothing.at.all }}", "{% if %}",
    "{{ ''.__class__.__mro__ }}", "{{ messages | indent(10**9) }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ [0] * 10**10 }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{{ 'x'.ljust(10**9) }}", "{{ ('x,' * 9999).replace('x', 'y' * 99999) }}", "{% include 'x' %}", "{{ 1 << 10**9 }}",
]  # fmt: skip


# Good inputs.


def write_good(folder: Path) -> None:
    """One good input of each kind, as `folder/KIND/...`."""
    from mlx_openelm import convert
    from mlx_openelm.formats import gguf as gguf_format
    from mlx_openelm.formats import mlx as mlx_format
    from mlx_openelm.text.tokenizer import Tokenizer

    import mlx.core as mx
    from quantization_models import write_tiny

    folder.mkdir()
    for kind in ("model-config", "model-weights", "model-sentencepiece", "model-settings"):
        write_tiny(folder / kind)
    convert(folder / "model-weights", folder / "model-packed", quantize=True, q_group_size=32)
    convert(folder / "model-weights", folder / "model-tokenizer", dtype="float32")
    (folder / "model-tokenizer" / "tokenizer.model").unlink()
    shutil.copytree(folder / "model-weights", folder / "model-index")
    weights = mx.load(str(folder / "model-index" / "model.safetensors"))
    (folder / "model-index" / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in sorted(set(shards.values())):
        part = {name: weights[name] for name, place in shards.items() if place == file}
        mx.save_safetensors(str(folder / "model-index" / file), part)
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model-index" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-gguf").mkdir()
    checkpoint = mlx_format.read(folder / "model-weights")
    tokenizer = Tokenizer.from_folder(folder / "model-weights")
    gguf_format.write(folder / "model-gguf" / "model.gguf", checkpoint, tokenizer, "q8_0", name="Tiny")
    _write_corenet(folder, weights)
    _write_adapters(folder)
    _write_training(folder)


def _section() -> dict[str, Any]:
    from quantization_models import tiny_config

    sizes = tiny_config(vocab_size=2048).to_dict()
    keys = ("num_query_heads", "num_kv_heads", "ffn_multipliers", "qkv_multipliers", "num_transformer_layers")
    more = ("model_dim", "head_dim", "ffn_dim_divisor", "normalize_qk_projections", "share_input_output_layers")
    section = {key: sizes[key] for key in (*keys, *more)}
    return section | {"model_name": "custom", "vocab_size": 2048, "padding_index": 2048,
                      "max_context_length": 512}  # fmt: skip


def _write_corenet(folder: Path, weights: dict[str, Any]) -> None:
    import mlx.core as mx
    import numpy as np
    import yaml

    names = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    tokenizer = FIXTURES / "shakespeare-hf" / "tokenizer.model"
    (folder / "model-port").mkdir()
    mx.save_safetensors(str(folder / "model-port" / "weights.safetensors"), names)
    (folder / "model-port" / "config.json").write_text(json.dumps(_section()))
    shutil.copy(tokenizer, folder / "model-port")
    state = {name: np.array(weight) for name, weight in names.items()}
    for kind in ("model-pt", "model-yaml"):
        (folder / kind).mkdir()
        write_state(folder / kind / "checkpoint.pt", state)
        run = {"model": {"language_modeling": {"general_gpt": _section()}}}
        (folder / kind / "run.yaml").write_text(yaml.safe_dump(run))
        shutil.copy(tokenizer, folder / kind)


def _write_adapters(folder: Path) -> None:
    """LoRA of every projection, for the model of `model-weights`."""
    from mlx_openelm import load
    from mlx_openelm.adapters.attaching import attach_new, extract
    from mlx_openelm.adapters.files import write_adapter

    import mlx.core as mx

    model, _ = load(folder / "model-weights", dtype="float32")
    attach_new(model, rank=4, scale=2.0)
    adapter = extract(model)
    for format in ("mlx", "peft"):
        (folder / f"adapter-{format}").mkdir()
        write_adapter(adapter, folder / f"adapter-{format}", model.config, format)
    import numpy as np

    (folder / "adapter-pt").mkdir()
    state = {}
    for path, change in adapter.modules.items():
        name = path.removeprefix("transformer.")
        state[f"{name}.lora_A.lora.weight"] = np.array(mx.contiguous(change.a.T))
        state[f"{name}.lora_B.lora.weight"] = np.array(mx.contiguous(change.b.T))
    write_state(folder / "adapter-pt" / "adapter.pt", state)


def _write_training(folder: Path) -> None:
    from mlx_openelm.quantization import sensitivity

    import pyarrow as pa
    from pyarrow import parquet
    from quantization_models import tiny_config

    turns = [({"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}) for i in range(4)]
    rows = [{"messages": list(pair)} for pair in turns]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for kind in ("data-jsonl", "data-gz", "data-parquet", "documents", "run", "sensitivities", "template"):
        (folder / kind).mkdir()
    (folder / "data-jsonl" / "train.jsonl").write_text(text)
    (folder / "data-gz" / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "data-parquet" / "train.parquet")
    (folder / "documents" / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Speak {i}."}) + "\n" for i in range(9))
    )
    recipe = Path(__file__).parents[1] / "lora" / "configs" / "270m.yaml"
    shutil.copy(recipe, folder / "run" / "run.yaml")
    costs = {module: {choice: 0.5 / choice.bits for choice in choices} for module, choices in
             sensitivity.candidates(tiny_config()).items()}  # fmt: skip
    sensitivity.Sensitivities(costs, "text", 100).save(folder / "sensitivities" / "sensitivities.json")
    (folder / "template" / "template.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
    )


# Mutations.


def write_mutant(good: Path, kind: str, seed: int, folder: Path) -> Path:
    """A mutated copy of the good input of a kind; returns the path to read."""
    draw = random.Random(f"{kind}-{seed}")
    shutil.copytree(good / kind, folder)
    target = _target(folder, kind, draw)
    if draw.random() < 0.03:
        _replace(target, draw)
    else:
        draw.choice(MUTATORS.get(target.suffix, [mutate_bytes]))(target, draw)
    return folder / TO_READ.get(kind, "")


def _target(folder: Path, kind: str, draw: random.Random) -> Path:
    names = {
        "model-config": ["config.json"],
        "model-weights": ["model.safetensors"],
        "model-packed": ["model.safetensors", "config.json"],
        "model-index": ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        "model-sentencepiece": ["tokenizer.model"],
        "model-tokenizer": ["tokenizer.json"],
        "model-settings": ["tokenizer_config.json"],
        "model-yaml": ["run.yaml"],
        "model-pt": ["checkpoint.pt"],
        "model-port": ["config.json", "weights.safetensors"],
    }
    found = names.get(kind) or sorted(path.name for path in folder.iterdir())
    return folder / draw.choice([name for name in found if name != "README.md"])


def _replace(path: Path, draw: random.Random) -> None:
    """Replace a file by something that is not one, or by an empty file."""
    path.unlink()
    choice = draw.randrange(5)
    if choice == 0:
        os.mkfifo(path)
    elif choice == 1:
        path.mkdir()
    elif choice == 2:
        path.symlink_to("/dev/zero")
    elif choice == 3:
        path.symlink_to(path.name)
    else:
        path.write_bytes(b"")


def mutate_bytes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        data = draw.choice(_BYTE_CHANGES)(data, draw)
    path.write_bytes(data)


def _place(data: bytearray, draw: random.Random) -> int:
    """A random offset, more often near an end, where headers and directories are."""
    if not data:
        return 0
    span = draw.choice([len(data), len(data), 64, 1024, 8192])
    offset = draw.randrange(min(span, len(data)))
    return offset if draw.random() < 0.75 else len(data) - 1 - offset


def _flip(data: bytearray, draw: random.Random) -> bytearray:
    if data:
        data[_place(data, draw)] ^= 1 << draw.randrange(8)
    return data


def _truncate(data: bytearray, draw: random.Random) -> bytearray:
    return data[: _place(data, draw)]


def _cut_out(data: bytearray, draw: random.Random) -> bytearray:
    start = _place(data, draw)
    del data[start : start + draw.choice([1, 2, 4, 8, 100])]
    return data


def _repeat(data: bytearray, draw: random.Random) -> bytearray:
    start = _place(data, draw)
    data[start:start] = data[start : start + draw.choice([1, 4, 8, 64])] * draw.choice([1, 2, 50])
    return data


def _integer(data: bytearray, draw: random.Random) -> bytearray:
    size = draw.choice([1, 2, 4, 8])
    start = _place(data, draw) // size * size
    value = draw.choice(EDGES) % (1 << 8 * size)
    data[start : start + size] = value.to_bytes(size, "little")
    return data


def _append(data: bytearray, draw: random.Random) -> bytearray:
    return data + draw.randbytes(draw.choice([1, 7, 64]))


_BYTE_CHANGES: list[Callable[[bytearray, random.Random], bytearray]] = [
    _flip, _flip, _truncate, _cut_out, _repeat, _integer, _integer, _append,
]  # fmt: skip


def mutate_json(path: Path, draw: random.Random) -> None:
    path.write_bytes(_changed_json(path.read_text(), draw))


def mutate_json_lines(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines()
    row = draw.randrange(len(lines))
    lines[row] = _changed_json(lines[row].decode(), draw)
    path.write_bytes(draw.choice([b"\n", b"\n", b"\r", b"\r\n"]).join(lines) + b"\n")


def mutate_safetensors_header(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = _changed_json(data[8 : 8 + length].decode(), draw)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def mutate_gzip(path: Path, draw: random.Random) -> None:
    lines = gzip.decompress(path.read_bytes()).splitlines()
    lines[0] = _changed_json(lines[0].decode(), draw)
    path.write_bytes(gzip.compress(b"\n".join(lines)))


def _changed_json(text: str, draw: random.Random) -> bytes:
    """The JSON with one to three of its values, keys or members changed."""
    root = {"root": json.loads(text)}
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(root))
        holder, key = draw.choice(places[:40] if draw.random() < 0.5 else places)
        action = draw.randrange(6)
        if action == 0 and holder is not root:
            del holder[key]
        elif action == 1 and isinstance(holder[key], list) and holder[key]:
            holder[key] = holder[key] * draw.choice([2, 3, 100]) if len(holder[key]) < 100 else holder[key][:1]
        elif action == 2 and isinstance(holder, dict) and holder is not root:
            holder[draw.choice(["x" * 300, "", f"{key}_", str(key).upper()])] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    written = json.dumps(root["root"])
    written = written.replace(f'"{DEEP}"', "[" * 90_000 + "]" * 90_000).replace(f'"{LONG}"', "9" * 6000)
    return written.encode("utf-8", "surrogatepass")


def _places(holder: Any) -> Any:
    """Every (container, key) in a JSON value."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def mutate_yaml(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    row = draw.choice([i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")])
    key = lines[row].partition(":")[0]
    value = draw.choice(VALUES)
    if draw.random() < 0.15:
        steps = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        lines[:0] = ["a0: &a0 [x, x, x]", *steps]
        value = "*a8"
    elif draw.random() < 0.1:
        value = "[" * 5000
    elif isinstance(value, str):
        value = value.encode("unicode_escape").decode() if draw.random() < 0.5 else value.replace("\ud800", "?")
    lines[row] = f"{key}: {value}"
    path.write_text("\n".join(lines) + "\n")


def mutate_zip(path: Path, draw: random.Random) -> None:
    """Rewrite the archive with zipfile, one of its members changed, removed, duplicated or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    row, action = draw.randrange(len(members)), draw.randrange(7)
    name, data = members[row]
    if action == 0:
        del members[row]
    elif action == 1:
        members[row] = (name, bytes(draw.choice(_BYTE_CHANGES)(bytearray(data), draw)))
    elif action == 2:
        members.append((name, data[::-1]))
    elif action == 3:
        row = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
        members[row] = (members[row][0], bytes(draw.choice(_BYTE_CHANGES)(bytearray(members[row][1]), draw)))
    elif action == 4:
        members = [(name, b"big" if name.endswith("byteorder") else data) for name, data in members]
    elif action == 5:
        members = [(name, data[: len(data) // 2] if "/data/" in name else data) for name, data in members]
    compression = zipfile.ZIP_DEFLATED if draw.random() < 0.25 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # about members with the same name
        for name, data in members:
            archive.writestr(name, data)


_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def mutate_gguf(path: Path, draw: random.Random) -> None:
    """Change a count, a length, a type, a number or an offset in the header."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2])):
        start, size = draw.choice(_gguf_fields(path.read_bytes()))
        value = draw.choice([*EDGES, *range(3, 16), 32, 2**20, 2**40])
        data[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    path.write_bytes(data)


def _gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """The offset and size in bytes of each number in the header; of an array, only the first elements."""
    fields, place = [(4, 4), (8, 8), (16, 8)], 24

    def number(size: int) -> int:
        nonlocal place
        fields.append((place, size))
        place += size
        return int.from_bytes(data[place - size : place], "little")

    def string() -> None:
        nonlocal place
        length = number(8)
        place += length

    def value(kind: int) -> None:
        if kind == _GGUF_STRING:
            string()
        elif kind == _GGUF_ARRAY:
            element, count = number(4), number(8)
            before = len(fields)
            for _ in range(count):
                value(element)
            del fields[before + 8 :]
        else:
            number(_GGUF_SIZES[kind])

    tensors, keys = (int.from_bytes(data[start : start + 8], "little") for start in (8, 16))
    for _ in range(keys):
        string()
        value(number(4))
    for _ in range(tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
    return fields


def mutate_template(path: Path, draw: random.Random) -> None:
    text = path.read_text()
    place = draw.randrange(len(text))
    path.write_text(
        draw.choice(TEMPLATES) if draw.random() < 0.7 else text[:place] + draw.choice(TEMPLATES) + text[place:]
    )


MUTATORS: dict[str, list[Callable[[Path, random.Random], None]]] = {
    ".json": [mutate_json, mutate_json, mutate_bytes],
    ".jsonl": [mutate_json_lines, mutate_json_lines, mutate_bytes],
    ".gz": [mutate_gzip, mutate_bytes],
    ".safetensors": [mutate_safetensors_header, mutate_bytes],
    ".pt": [mutate_zip, mutate_bytes],
    ".gguf": [mutate_gguf, mutate_gguf, mutate_bytes],
    ".yaml": [mutate_yaml, mutate_yaml, mutate_bytes],
    ".jinja": [mutate_template, mutate_template, mutate_bytes],
}
