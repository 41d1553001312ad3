"""Writing a tokenizer so that transformers and mlx-lm read it to the same ids."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .chat_template import DEFAULT
from .sentencepiece import read_model
from .tokenizer_spec import SPACE, TokenizerSpec


def save(
    folder: Path,
    spec: TokenizerSpec,
    bos_token_id: int,
    *,
    named: Mapping[str, str],
    config: Mapping[str, Any],
    model_file: Path | None,
    templates: Mapping[str, str],
) -> None:
    """Write the files of `Tokenizer.save`.

    Args:
        named: the texts of BOS, EOS and the unknown token, by their keys in `tokenizer_config.json`.
        config: the `tokenizer_config.json` that was read.
        model_file: the `tokenizer.model` to copy; left out if it has another rule for the space in front, which would
            give other ids.
        templates: jinja sources by name. One that is not alone goes into `tokenizer_config.json`, since programs differ
            in whether they copy the subfolder that transformers would make.
    """
    kept = {key: config[key] for key in ("pad_token", "model_max_length") if config.get(key) is not None}
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    # Left out if the model had no row for it: a reader would add it again.
    if not isinstance(pad, str) or (pad not in spec.vocab and all(pad != token.content for token in spec.added)):
        kept.pop("pad_token", None)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # LlamaTokenizer ignores the file's own normalizer
        **named,
        **kept,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if spec.parsed:  # programs that read tokenizer.model look for added tokens here
        added = {str(token.id): token.to_dict() for token in spec.added}
        values["added_tokens_decoder"] = {key: {k: v for k, v in t.items() if k != "id"} for key, t in added.items()}
        values["legacy"] = not spec.first_only
    alone = list(templates) == [DEFAULT]
    if templates and not alone:
        values["chat_template"] = [{"name": name, "template": source} for name, source in templates.items()]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", json.dumps(write_spec(spec, bos_token_id), ensure_ascii=False, indent=1))
    _write(folder / "tokenizer_config.json", json.dumps(values, ensure_ascii=False, indent=2))
    if alone:
        _write(folder / "chat_template.jinja", templates[DEFAULT])
    target = folder / "tokenizer.model"
    if model_file is None or (target.exists() and target.samefile(model_file)):
        return
    if read_model(model_file).add_dummy_prefix == spec.adds_space:
        shutil.copyfile(model_file, target)


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_spec(spec: TokenizerSpec, bos_token_id: int) -> dict[str, Any]:
    """The contents of a `tokenizer.json` that other programs read to the same ids, BOS first."""
    bos_token = next((t.content for t in spec.added if t.id == bos_token_id), None) or next(
        piece for piece, i in spec.vocab.items() if i == bos_token_id
    )
    # Prepending in the normalizer would also change the tokens that are matched in normalized text.
    prepends = spec.adds_space and not spec.first_only and not any(token.normalized for token in spec.added)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.to_dict() for token in sorted(spec.added, key=lambda token: token.id)],
        "normalizer": _space_normalizer(prepends),
        "pre_tokenizer": _space_pre_tokenizer(spec, prepends=prepends),
        "post_processor": _template_processing(bos_token, bos_token_id),
        "decoder": _space_decoder(spec.adds_space),
        "model": _write_model(spec),
    }


def _write_model(spec: TokenizerSpec) -> dict[str, Any]:
    if spec.scores:
        vocab = [[piece, score] for piece, score in zip(spec.pieces, spec.scores, strict=True)]
        unknown = spec.vocab[spec.unk_token]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": spec.byte_fallback}
    # Older readers (mlx-swift's among them) accept merges only as one string.
    as_pairs = any(" " in piece for pair in spec.merges for piece in pair)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": spec.unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": spec.fuse_unk,
        "byte_fallback": spec.byte_fallback,
        "ignore_merges": spec.ignore_merges,
        "vocab": spec.vocab,
        "merges": [list(pair) if as_pairs else " ".join(pair) for pair in spec.merges],
    }


def _space_normalizer(prepends: bool) -> dict[str, Any]:
    """Spaces become U+2581, with one more in front if it `prepends`. `Metaspace` would not add one to text that starts
    with a space."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {"type": "Sequence", "normalizers": [prepend, replace] if prepends else [replace]}


def _space_pre_tokenizer(spec: TokenizerSpec, *, prepends: bool) -> dict[str, Any] | None:
    """The `Metaspace` steps of `TokenizersEngine`; if the normalizer `prepends` the space in front, they do not."""
    adds_space = spec.adds_space and not prepends
    steps: list[dict[str, Any]] = []
    if adds_space:
        scheme = "first" if spec.first_only else "always"
        steps.append({"type": "Metaspace", "replacement": " ", "prepend_scheme": scheme, "split": False})
    if adds_space or spec.splits:
        steps.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": spec.splits})
    if len(steps) > 1:
        return {"type": "Sequence", "pretokenizers": steps}
    return steps[0] if steps else None


def _space_decoder(adds_space: bool) -> dict[str, Any]:
    """From pieces back to text: U+2581 to spaces, bytes to characters, and the space in front removed."""
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _template_processing(bos_token: str, bos_token_id: int) -> dict[str, Any]:
    """A `TemplateProcessing` that puts one token in front of a text, and of both texts of a pair."""

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos_token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [bos_token_id], "tokens": [bos_token]}},
    }
