"""Reads mutants one after the other, in a separate process: `fuzz_worker.py GOOD SCRATCH`, cases on standard input.

A case is a line `KIND SEED`; the answer is a line of JSON with `outcome`: `right` (read, and what another reader says
of the file is the same), `refused` (one clean line), or `fault` with a `reason`.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_openelm  # noqa: F401 (before MLX, which binds its BLAS when it is imported)
from mlx_openelm.errors import OpenELMError

import mlx.core as mx
import numpy as np
from fuzzing import KINDS, write_mutant

mx.set_default_device(mx.cpu)

TEXTS = ["To be, or not", "  two  spaces ", "naïve 日本 🙂\n", "</s> <unk> <0x41>"]
MAX_SECONDS, MAX_MEMORY = 4.0, 300 << 20


class WrongError(Exception):
    """The file was read without an error, but to the wrong values."""


# The readers of mutants: each raises OpenELMError or returns. Results are checked against other readers.


def model(path: Path, kind: str) -> None:
    from mlx_openelm.generation.stream import stream_generate
    from mlx_openelm.loading import build_model
    from mlx_openelm.sources import open_source

    yaml = path.with_name("run.yaml")
    source = open_source(path, config_yaml=yaml if yaml.exists() else None)
    names = source.checkpoint.weights.tensors
    with source.reading():
        weights = {name: np.array(tensor.read().astype(mx.float32)) for name, tensor in names.items()}
    _check_weights(path, kind, weights)
    _check_tokenizer(path, source.tokenizer)
    with source.reading():
        built = build_model(source.checkpoint, dtype="float32")
    pieces = list(stream_generate(built, source.tokenizer, "To be", max_tokens=3, temp=0.0))
    if not all(math.isfinite(piece.logprob) for piece in pieces):
        raise WrongError("logits are not finite")


def adapter(path: Path, kind: str) -> None:
    from mlx_openelm import load
    from mlx_openelm.adapters.attaching import attach
    from mlx_openelm.adapters.files import read_adapter

    base, _ = load(path_of_good / "model-weights", dtype="float32")
    attach(base, read_adapter(path, base.config))
    mx.eval(base(mx.array([[1, 5, 9]])))


def data(path: Path, kind: str) -> None:
    from mlx_openelm.training.data.read import read_splits

    read_splits(path)


def documents(path: Path, kind: str) -> None:
    from mlx_openelm.evaluation.windows import load_documents

    load_documents(path)


def run(path: Path, kind: str) -> None:
    from mlx_openelm.training import config_file
    from mlx_openelm.training.options import FineTuneOptions

    config_file.merge(FineTuneOptions, config_file.read(path), {})


def sensitivities(path: Path, kind: str) -> None:
    from mlx_openelm.quantization import sensitivity

    from quantization_models import tiny_config

    sensitivity.read(path, tiny_config())


def template(path: Path, kind: str) -> None:
    from mlx_openelm.text.tokenizer import Tokenizer

    messages = [{"role": "user", "content": "Speak."}, {"role": "assistant", "content": "No."}]
    ids = Tokenizer.from_folder(path_of_good / "model-weights").apply_chat_template(messages, path)
    if not all(0 <= token_id < 2048 for token_id in ids):
        raise WrongError("ids beyond the vocabulary")


# Other readers.


def _check_weights(path: Path, kind: str, weights: dict[str, np.ndarray]) -> None:
    elsewhere = _read_elsewhere(path, kind)
    if elsewhere and (unknown := weights.keys() - elsewhere.keys()):
        raise WrongError(f"{min(unknown)} is not in the file")
    for name, expected in elsewhere.items():
        if name in weights and not np.array_equal(weights[name], expected, equal_nan=True):
            raise WrongError(f"{name} is not what is in the file")


def _read_elsewhere(path: Path, kind: str) -> dict[str, np.ndarray]:
    """The file's tensors in float32, by our names, as the format's own library reads them."""
    if kind in ("model-config", "model-weights", "model-index", "model-port"):
        return _read_safetensors(path)
    if kind == "model-gguf":
        return _read_gguf(path)
    if kind in ("model-pt", "model-yaml"):
        try:
            import torch
        except ImportError:
            return {}
        try:
            state = torch.load(path, weights_only=True)
        except Exception:  # PyTorch may refuse a file that is read right here, if only an unused record is damaged
            return {}
        return {f"transformer.{name}": tensor.float().numpy() for name, tensor in state.items()}
    return {}


def _read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    found = {}
    for file in folder.glob("*.safetensors"):
        prefix = "transformer." if file.name == "weights.safetensors" else ""
        found |= {prefix + name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}
    return found


GGUF_NAMES = {
    "attn_qkv": "attn.qkv_proj",
    "attn_output": "attn.out_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "ffn_down": "ffn.proj_2",
}


def _read_gguf(path: Path) -> dict[str, np.ndarray]:
    import gguf
    from gguf.quants import dequantize

    try:
        tensors = gguf.GGUFReader(path).tensors
        stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    except Exception:  # the gguf package rejects damage that we tolerate, e.g. in unused keys
        return {}
    found = {}
    for name, values in stored.items():
        parts = name.split(".")
        if name == "token_embd.weight":
            found["transformer.token_embeddings.weight"] = values
        elif name == "output_norm.weight":
            found["transformer.norm.weight"] = values
        elif len(parts) > 2 and parts[2] in GGUF_NAMES:
            found[f"transformer.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.weight"] = values
        elif len(parts) > 2 and parts[2] == "ffn_gate" and (up := stored.get(name.replace("gate", "up"))) is not None:
            found[f"transformer.layers.{parts[1]}.ffn.proj_1.weight"] = np.concatenate([values, up])
    return found


def _check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Ids equal SentencePiece's if there is a `tokenizer.model`; they have pieces, and decode to the text."""
    from sentencepiece import SentencePieceProcessor

    file = (path if path.is_dir() else path.parent) / "tokenizer.model"
    ids = [tokenizer.encode(text, add_bos=False) for text in TEXTS]
    for text, found in zip(TEXTS, ids, strict=True):
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in found):
            raise WrongError("ids beyond the vocabulary")
        if not isinstance(tokenizer.decode(found), str) or (text and not found):
            raise WrongError(f"{text!r} has no ids")
    is_other = path.is_dir() and ((path / "tokenizer.json").exists() or (path / "added_tokens.json").exists())
    if file.is_file() and not is_other and path.suffix != ".gguf":
        expected = [SentencePieceProcessor(model_proto=file.read_bytes()).encode(text) for text in TEXTS]
        if ids != expected:
            raise WrongError("ids are not SentencePiece's")


# One case.


def judge(kind: str, seed: int, scratch: Path) -> dict[str, Any]:
    folder = scratch / f"{kind}-{seed}"
    path = write_mutant(path_of_good, kind, seed, folder)
    read: Callable[[Path, str], None] = globals()[kind.partition("-")[0]]
    before, started = _peak(), time.process_time()
    try:
        read(path, kind)
        outcome = {"outcome": "right"}
    except OpenELMError as error:
        outcome = _of_message(str(error))
    except BaseException as error:  # a Rust panic is not an Exception
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        outcome = {"outcome": "fault", "reason": reason, "trace": traceback.format_exception(error)[-5:-1]}
    seconds, grown = time.process_time() - started, _peak() - before
    shutil.rmtree(folder, ignore_errors=True)
    if outcome["outcome"] != "fault" and seconds > MAX_SECONDS:
        outcome = {"outcome": "fault", "reason": f"took {seconds:.1f} s"}
    if outcome["outcome"] != "fault" and grown > MAX_MEMORY:
        outcome = {"outcome": "fault", "reason": f"took {grown >> 20} MB"}
    return outcome | {"kind": kind, "seed": seed, "seconds": round(seconds, 2)}


def _of_message(message: str) -> dict[str, Any]:
    is_clean = message.strip() and message.isprintable() and len(message) < 1500
    if is_clean:
        return {"outcome": "refused", "reason": message}
    return {"outcome": "fault", "reason": f"no clean line: {message[:300]!r}"}


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    scratch = Path(sys.argv[2])
    scratch.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for kind in KINDS:  # a first use's imports are not part of a mutant's cost
        _warm_up(kind, scratch)
    if sys.platform.startswith("linux"):  # the limit on address space while mutants are read
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        kind, seed = line.split()
        print(json.dumps(judge(kind, int(seed), scratch)), flush=True)


def _warm_up(kind: str, scratch: Path) -> None:
    from fuzzing import TO_READ

    read: Callable[[Path, str], None] = globals()[kind.partition("-")[0]]
    read(path_of_good / kind / TO_READ.get(kind, ""), kind)


if __name__ == "__main__":
    path_of_good = Path(sys.argv[1])
    main()
