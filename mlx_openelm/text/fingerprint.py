"""What identifies a tokenizer: tokens that were kept are of use to nothing else."""

from __future__ import annotations

import hashlib

from ..errors import RequestError
from .tokenizer import Tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of a tokenizer: its tokens, how it splits text into them, and its BOS and EOS."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    try:
        spec = tokenizer.spec
    except RequestError:  # a SentencePiece model that no tokenizer.json can reproduce
        assert tokenizer.model_file is not None
        return hashlib.sha256(tokenizer.model_file.read_bytes() + repr(ids).encode()).hexdigest()[:32]
    parts = [sorted(spec.vocab.items(), key=lambda item: item[1]), spec.merges, spec.added, spec.scores]
    parts += [spec.adds_space, spec.first_only, spec.splits, spec.byte_fallback, spec.fuse_unk, spec.ignore_merges]
    return hashlib.sha256(repr([*parts, *ids]).encode("utf-8", "surrogatepass")).hexdigest()[:32]
