"""Finding a copy of the tokenizer that all published models share: Llama 2's.

Apple's repositories have no tokenizer, the one they point to is gated, and not every community conversion has a copy.
So we try each known location, local ones first, and check every copy: other tokenizers also have 32,000 pieces and the
same special tokens, but give different ids.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import OpenELMError, RequestError
from ..hub import catalog, offline, resolve
from ..hub.errors import is_absent, is_refused
from ..inputs import read_bytes
from .tokenizer import Tokenizer

FALLBACK = catalog.TOKENIZER_REPO
# Names that mlx-community gave to conversions, after the model's own.
_SUFFIXES = ("", "-4bit", "-8bit")
# Repositories that exist without a suffix and are named in public code; they are tried first.
_KNOWN = ("OpenELM-270M", "OpenELM-270M-Instruct", "OpenELM-450M-Instruct", "OpenELM-3B", "OpenELM-3B-Instruct")
# The parts of the cache to search first; Apple's documentation points to Meta's repositories.
_CACHED = (
    "mlx-community--OpenELM*",
    "apple--OpenELM*",
    "hf-internal-testing--llama-tokenizer",
    "meta-llama--Llama-2-*",
)
# The bytes that a `tokenizer.json` has for each piece, in any layout: Llama 2's has 36 to 122.
_JSON_BYTES = (30, 200)

_MISSING = "the tokenizer, Llama 2's, which Apple's repositories lack,"


@dataclass(frozen=True)
class Identity:
    """What identifies a tokenizer: its size, special ids, the SHA-256 of its `tokenizer.model`, ids of samples."""

    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    sha256: str
    ids: Mapping[str, str]  # as SentencePiece gives them, without BOS


LLAMA2 = Identity(
    vocab_size=32000,
    bos_token_id=1,
    eos_token_id=2,
    sha256="9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
    ids={
        "Hello, world! It's 2024.": "15043 29892 3186 29991 739 29915 29879 29871 29906 29900 29906 29946 29889",
        " def f(x):\n    return x  ** 2\t# indented  ": (
            "29871 822 285 29898 29916 1125 13 1678 736 921 29871 3579 29871 29906 12 29937 1399 14927 259"
        ),
        "Größe, naïve; Привет; 日本語; العربية; हिन्दी": (
            "1632 29997 5831 29892 1055 30085 345 29936 7203 7616 29936 29871 30325 30346 30968 29936 24508 30218 "
            "30156 30177 30163 30242 29936 29871 30714 30436 30424 30296 30694 30580"
        ),
        "🦙 ÿ\x00\x7f ½ ∑ ꙮ": "29871 243 162 169 156 29871 30370 3 130 29871 30226 29871 31060 29871 237 156 177",
        "antidisestablishmentarianism": "3677 333 275 342 370 1674 358 13956 1608",
    },
)


def find(release: catalog.Release, *, eos_token_ids: Collection[int] | None = None) -> Tokenizer:
    """The tokenizer of a published model: a copy in the hub's cache, else the first that can be downloaded.

    Only tokenizer files are downloaded. A chat template is kept only from the model's own repository.

    Args:
        eos_token_ids: all tokens that end a generation; by default the tokenizer's own.

    Raises:
        RequestError: no repository has the right tokenizer.
        OpenELMError: the network or the hub failed, or the repositories refuse access.
    """
    for folder in _cached(release):
        if (tokenizer := accept(folder, LLAMA2, eos_token_ids=eos_token_ids)) is not None:
            return _without_foreign_template(tokenizer, release, folder)
    refusal: OpenELMError | None = None
    for repo in candidates(release):
        try:
            folder = resolve.download(repo, patterns=resolve.TOKENIZER_PATTERNS, advice=offline.tokenizer())
        except OpenELMError as error:
            if is_absent(error):
                continue
            if not is_refused(error):  # the others would fail the same way
                advice = "" if offline.tokenizer() in str(error) else f"; or {offline.tokenizer()}"
                raise type(error)(f"{_MISSING} is not here: {error}{advice}") from error
            refusal = refusal or error
            continue
        if (tokenizer := accept(folder, LLAMA2, eos_token_ids=eos_token_ids)) is not None:
            return _without_foreign_template(tokenizer, release, folder)
    if refusal is not None:
        raise OpenELMError(
            f"{_MISSING} is in no repository that can be read ({refusal}); {offline.tokenizer()}"
        ) from refusal
    raise RequestError(
        f"{_MISSING} is neither in {release.tokenizer_repo}, nor in those of its siblings, nor in {FALLBACK}; "
        "give a copy of its tokenizer.model with --tokenizer"
    )


def candidates(release: catalog.Release) -> list[str]:
    """Repositories that may have the tokenizer, in the order to try them: the model's own, those known to exist, the
    model's quantized ones, the rest."""
    names = [known.name for known in catalog.releases()]
    own = [f"{release.name}{suffix}" for suffix in _SUFFIXES]
    rest = [f"{name}{suffix}" for suffix in _SUFFIXES for name in names]
    ordered = dict.fromkeys([own[0], *_KNOWN, *own[1:], *rest])
    return [*(f"mlx-community/{name}" for name in ordered), FALLBACK]


def accept(folder: Path, identity: Identity, *, eos_token_ids: Collection[int] | None = None) -> Tokenizer | None:
    """The tokenizer in a folder, or None if it is damaged or does not match `identity`.

    A `tokenizer.model` must have the right checksum. A `tokenizer.json` can be written in many ways, so its ids are
    compared; if they differ, only the `tokenizer.model` beside it is used.
    """
    model = folder / "tokenizer.model"
    for path in (folder, model):  # in a folder, `tokenizer.json` comes first
        with contextlib.suppress(RequestError):  # not there, or damaged
            if model.exists() and hashlib.sha256(read_bytes(model)).hexdigest() != identity.sha256:
                return None
            tokenizer = Tokenizer.from_file(path, eos_token_ids=eos_token_ids)
            if _matches(tokenizer, identity):
                return tokenizer
    return None


def _matches(tokenizer: Tokenizer, identity: Identity) -> bool:
    own = (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return own == (identity.vocab_size, identity.bos_token_id, identity.eos_token_id) and all(
        tokenizer.encode(text, add_bos=False) == [int(number) for number in ids.split()]
        for text, ids in identity.ids.items()
    )


def _cached(release: catalog.Release) -> Iterator[Path]:
    """Folders in the hub's cache that may have the tokenizer: the model's own repository first, then the known ones,
    then all others; newest snapshots first."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    known = [path for pattern in _CACHED for path in sorted(cache.glob(f"models--{pattern}"))]
    known.sort(key=lambda repo: repo.name != _cache_name(release))
    for repo in dict.fromkeys([*known, *sorted(cache.glob("models--*"))]):
        snapshots = [path for path in repo.glob("snapshots/*") if _may_have(path, LLAMA2)]
        yield from sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True)


def _may_have(folder: Path, identity: Identity) -> bool:
    """Whether to read a folder's tokenizer. A cache may hold hundreds of models, and reading a `tokenizer.json` takes
    a third of a second, so one of another size is left out; a checksum is fast."""
    if (folder / "tokenizer.model").is_file():
        return True
    file = folder / "tokenizer.json"
    least, most = (count * identity.vocab_size for count in _JSON_BYTES)
    return file.is_file() and least <= file.stat().st_size <= most


def _cache_name(release: catalog.Release) -> str:
    return f"models--{release.tokenizer_repo.replace('/', '--')}"


def _without_foreign_template(tokenizer: Tokenizer, release: catalog.Release, folder: Path) -> Tokenizer:
    """Drop the chat template of another model's repository: it describes how that model was tuned."""
    if _cache_name(release) not in folder.parts:
        tokenizer.chat_template = None
    return tokenizer
