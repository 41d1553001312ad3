"""The text of a model card: what the model is, how it was made, its measured quality, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..formats import mlx as mlx_format
from ..formats import safetensors
from ..formats.mlx import Checkpoint, Quantization, most_common
from ..hub import catalog

Layout = Literal["mlx", "huggingface", "gguf"]

PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Quality:
    """Measurements on a text: perplexity, perplexity before quantization, and KL divergence in nats per token."""

    text: str
    tokens: int
    perplexity: float
    full_perplexity: float | None = None
    kl_divergence: float | None = None


@dataclass(frozen=True)
class Facts:
    """Facts that the files do not state. `parameters` and `layers` are only for GGUF, which has no config.json."""

    source: str | None
    command: str | None = None
    method: str | None = None
    recipe: str | None = None
    quality: tuple[Quality, ...] = ()
    parameters: int | None = None
    layers: int | None = None
    rounded_to: str | None = None
    adapters: tuple[str, ...] = ()
    trained_tokens: int | None = None
    from_scratch: bool | None = None  # None for no

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, without the empty ones."""
        values = asdict(self)
        values["quality"] = [_present(entry) for entry in values["quality"]]
        values["adapters"] = list(values["adapters"])
        return _present(values)

    @classmethod
    def from_dict(cls, values: object) -> Facts | None:
        """The reverse of `to_dict`; None if the values do not have its form."""
        if not isinstance(values, dict):
            return None
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        try:
            quality = tuple(Quality(**entry) for entry in known.pop("quality", ()))
            adapters = tuple(str(entry) for entry in known.pop("adapters", ()))
            facts = cls(**{"source": None} | known, quality=quality, adapters=adapters)
        except TypeError:
            return None
        numbers: list[float | None] = [facts.parameters, facts.layers, facts.trained_tokens]
        numbers += [value for q in quality for value in (q.tokens, q.perplexity)]
        numbers += [value for q in quality for value in (q.full_perplexity, q.kl_divergence)]
        are_numbers = all(value is None or isinstance(value, int | float) for value in numbers)
        return facts if are_numbers else None


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, (), [])}


@dataclass(frozen=True)
class Contents:
    """What the files of a model state. `checkpoint` is None for GGUF; `code` is the repository in `auto_map`."""

    layout: Layout
    files: tuple[Path, ...]
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    code: str | None = None

    @classmethod
    def read(cls, path: Path) -> Contents:
        """Read the headers of the files in a folder, or of one GGUF file.

        Raises:
            RequestError: no model, or files that contradict each other.
        """
        if path.is_file():
            return cls("gguf", (path,))
        ggufs = tuple(sorted(path.glob("*.gguf")))
        if ggufs and not any(path.glob("*.safetensors")):
            return cls("gguf", ggufs)
        checkpoint = mlx_format.read(path)
        _, values = mlx_format.read_config(path)
        auto_map = values.get("auto_map")
        entries = [str(entry) for entry in auto_map.values()] if isinstance(auto_map, dict) else []
        code = next((entry.partition("--")[0] for entry in entries if "--" in entry), None)
        layout: Layout = "huggingface" if entries and not checkpoint.quantization else "mlx"
        return cls(layout, tuple(safetensors.weight_files(path)), checkpoint, code)

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's tensors by name; empty for GGUF."""
        return {} if self.checkpoint is None else self.checkpoint.config.tensor_shapes()

    @property
    def common(self) -> Quantization | None:
        """The quantization of most matrices; None if the model is not quantized."""
        packed = self.checkpoint.quantization if self.checkpoint is not None else {}
        return most_common(packed) if packed else None


def render(contents: Contents, name: str, metadata: Mapping[str, Any], facts: Facts) -> str:
    """The card's text for a model that will be available as `name`."""
    parts = [
        f"# {name.rpartition('/')[2]}",
        _introduction(contents, metadata, facts),
        _sizes(contents, facts),
        *_provenance(facts),
        *_quantization(contents, facts),
        *_quality(facts),
        "## License",
        _license(metadata, facts),
        "## How to use",
        *_usage(contents, name),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(contents: Contents, metadata: Mapping[str, Any], facts: Facts) -> str:
    base = metadata.get("base_model")
    names = [base] if isinstance(base, str) else [str(item) for item in base or ()]
    what = " and ".join(f"[{repo}](https://huggingface.co/{repo})" for repo in names)
    relation = metadata.get("base_model_relation")
    if facts.source in catalog.PACKAGED:
        what = f"{facts.source}, a model inside mlx-openelm, trained on Shakespeare's plays and poems (public domain)"
    elif what and relation in ("finetune", "adapter", "merge"):
        what = f"a model derived from {what} ({relation})"
    elif not what:
        what = f"an OpenELM model ({facts.source})" if facts.source else "an OpenELM model"
    form = {"mlx": "for MLX", "huggingface": "in Hugging Face's layout", "gguf": "as GGUF, for llama.cpp"}
    packed = f", quantized to {contents.common.bits} bits" if contents.common is not None else ""
    maker = "converted" if facts.source else "published"
    if facts.trained_tokens is not None:
        maker = f"trained on {facts.trained_tokens:,} tokens"
    return (
        f"This is {what}, {form[contents.layout]}{packed}, {maker} with mlx-openelm. OpenELM is Apple's family of "
        "open language models with layer-wise scaling ([paper](https://arxiv.org/abs/2404.14619))."
    )


def _sizes(contents: Contents, facts: Facts) -> str:
    checkpoint = contents.checkpoint
    rows = {}
    if checkpoint is not None:
        dtype = str(checkpoint.dtype).removeprefix("mlx.core.")
        bits = checkpoint.bits_per_weight
        rows["Parameters"] = f"{checkpoint.config.num_parameters:,}"
        rows["Layers"] = str(checkpoint.config.num_transformer_layers)
        rows["Context"] = f"{checkpoint.config.max_context_length:,} tokens"
        rows["Type" if contents.common is None else "Type of other tensors"] = dtype
        rows["Bits per weight"] = f"{bits:.2f}"
    else:
        rows |= {"Parameters": f"{facts.parameters:,}"} if facts.parameters is not None else {}
        rows |= {"Layers": str(facts.layers)} if facts.layers is not None else {}
        if facts.parameters is not None:
            rows["Bits per weight"] = f"{8 * contents.size / facts.parameters / max(len(contents.files), 1):.2f}"
        rows |= {f"`{file.name}`": _megabytes(file.stat().st_size) for file in contents.files}
    rows["Weights on disk"] = _megabytes(contents.size)
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _provenance(facts: Facts) -> Iterator[str]:
    if facts.command is not None:
        yield "## How it was made"
        yield f"```shell\n{facts.command}\n```"
    if facts.adapters:
        yield f"Fused into the base: {'; '.join(facts.adapters)}."
    if facts.rounded_to is not None:
        was = f"The original weights were quantized to {facts.rounded_to}"
        yield f"{was} and then unpacked, so they are no more precise than that."


def _quantization(contents: Contents, facts: Facts) -> Iterator[str]:
    checkpoint = contents.checkpoint
    if contents.common is None and (checkpoint is not None or facts.method is None):
        return
    yield "## Quantization"
    how = [f"method `{facts.method}`"] if facts.method else []
    how += [f"recipe `{facts.recipe}`"] if facts.recipe else []
    if how:
        yield f"Quantized with {' and '.join(how)}."
    if contents.common is None or checkpoint is None:
        return
    matrices = [path.removesuffix(".weight") for path, shape in contents.shapes.items() if len(shape) == 2]
    groups: dict[Quantization | None, list[str]] = {contents.common: []}
    for path in matrices:
        groups.setdefault(checkpoint.quantization.get(path), []).append(path)
    rows = ["| matrices | bits | group size | mode | which |", "| --- | --- | --- | --- | --- |"]
    for choice, paths in groups.items():
        everything = "all" if len(groups) == 1 else "all others"
        which = everything if choice == contents.common else _which(paths)
        settings = "not packed | | |" if choice is None else f"{choice.bits} | {choice.group_size} | {choice.mode} |"
        rows.append(f"| {len(paths)} | {settings} {which} |")
    yield "\n".join(rows)


def _which(paths: list[str]) -> str:
    """Module paths, shortened: `ffn.proj_2` of layers 0-3, 7."""
    layers: dict[str, list[int]] = {}
    for path in paths:
        match = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", path)
        part = match[2] if match else path.removeprefix("transformer.")
        layers.setdefault(part, []).extend([int(match[1])] if match else [])
    named = [f"`{part}`" + _layers(numbers) for part, numbers in layers.items()]
    return "; ".join(named)


def _layers(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f" of layer{'s' * (len(numbers) > 1)} {text}" if numbers else ""


def _quality(facts: Facts) -> Iterator[str]:
    if not facts.quality:
        return
    yield "## Measured quality"
    rows = [
        "| text | tokens | perplexity | before quantization | KL divergence (nats per token) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in facts.quality:
        full = "" if entry.full_perplexity is None else f"{entry.full_perplexity:.4f}"
        divergence = "" if entry.kl_divergence is None else f"{entry.kl_divergence:.6f}"
        rows.append(f"| {entry.text} | {entry.tokens:,} | {entry.perplexity:.4f} | {full} | {divergence} |")
    yield "\n".join(rows)


def _license(metadata: Mapping[str, Any], facts: Facts) -> str:
    name = metadata.get("license_name") or metadata.get("license")
    link = metadata.get("license_link")
    base = metadata.get("base_model")
    is_original = bool(facts.from_scratch) and not base
    if not name and not link:
        if is_original:
            return "None is stated: the model was trained from random weights, and its makers choose the license."
        is_conversion = metadata.get("base_model_relation") in (None, "quantized")
        if is_conversion and catalog.find_repo(base) is not None:
            return f"The weights are under the license of [{base}](https://huggingface.co/{base}): see its page."
        return "No license came with the original, so none is stated here; ask its authors before you share the model."
    text = f"[{name or 'its license'}]({link})" if link else str(name)
    return f"The weights are under {'this license' if is_original else 'the license of the original'}: {text}."


def _usage(contents: Contents, name: str) -> Iterator[str]:
    if contents.layout == "gguf":
        yield from _gguf_usage(contents, name)
        return
    yield "With mlx-openelm, in a terminal:"
    yield f'```shell\nmlx-openelm generate --model {name} --prompt "{PROMPT}"\n```'
    yield "or in Python:"
    yield (
        "```python\nfrom mlx_openelm import generate, load\n\n"
        f'model, tokenizer = load("{name}")\nprint(generate(model, tokenizer, "{PROMPT}"))\n```'
    )
    if contents.layout == "mlx":
        yield "With mlx-lm:"
        yield f'```shell\nmlx_lm.generate --model {name} --prompt "{PROMPT}"\n```'
    elif contents.code is not None:
        yield "With transformers 4:"
        yield (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
        )
        yield (
            f"`trust_remote_code=True` runs the model's code from [{contents.code}](https://huggingface.co/"
            f"{contents.code}), which fails in transformers 5."
        )


def _gguf_usage(contents: Contents, name: str) -> Iterator[str]:
    file = contents.files[0].name
    is_repo = "/" in name
    location = f"--hf-repo {name} --hf-file {file}" if is_repo else f"-m {file}"
    yield "With llama.cpp:"
    yield f'```shell\nllama-cli {location} -p "{PROMPT}"\n```'
    yield "With mlx-openelm (extra `gguf`):"
    fetch = f"hf download {name} {file} --local-dir .\n" if is_repo else ""
    yield f'```shell\n{fetch}mlx-openelm generate --model {file} --prompt "{PROMPT}"\n```'
