"""The models of a server by name, which of them are in memory, and their adapters.

All that computes belongs to the engine's thread; names, tokenizers and sizes are for every thread.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path

import mlx.core as mx

from .. import backend
from ..adapters.attaching import check_fits
from ..adapters.files import read_adapter
from ..adapters.pool import AdapterPool
from ..config import ModelConfig
from ..errors import RequestError, quote
from ..generation.cache_origin import Origin
from ..generation.engine import MAX_ROWS, Engine
from ..generation.memory import model_bytes
from ..generation.prefix_disk import PrefixDisk
from ..generation.prefix_tree import PrefixTree
from ..model import OpenELM
from ..sources import Source
from ..text.tokenizer import Tokenizer
from ..wording import size
from .failures import APIError

log = logging.getLogger("mlx_openelm.serving")

# Shares of the memory that is free once the models are loaded: for texts, and for what prompts begin with.
_TEXTS, _PREFIXES = 0.5, 0.25
# The part of the memory that is free at the start which models may fill.
_MODELS = 0.7

# A model, its tokenizer, and the model that drafts for it.
Load = Callable[[str], tuple[OpenELM, Tokenizer, OpenELM | None]]


@dataclass(eq=False)
class Resident:
    """A model in memory, and what decodes with it."""

    name: str
    model: OpenELM
    draft: OpenELM | None
    nbytes: int
    engine: Engine
    pool: AdapterPool | None
    tree: PrefixTree


@dataclass
class Entry:
    """A model that requests can name. `nbytes` is the size of its weights, `adapters` are paths by name."""

    name: str
    source: str
    tokenizer: Tokenizer
    config: ModelConfig
    nbytes: int
    adapters: dict[str, str] = field(default_factory=dict)
    resident: Resident | None = None
    used: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def most_characters(self) -> int:
        """So many characters are more tokens than the context has; a text is measured before it is made into tokens.

        Normalization may make a text shorter, hence the margin.
        """
        tokens = (self.tokenizer.token_bytes(token) or b"" for token in range(self.tokenizer.vocab_size))
        return 4 * max(map(len, tokens)) * self.config.rope_max_length


class Models:
    """What a server offers, and a number of bytes that decides which models are in memory.

    Args:
        names: what to load, by the names that requests use; the first is the default.
        adapters: paths by name; each is for the models that it fits.
        open: finds a model, without reading its weights.
        load: loads one.
        max_bytes: the most memory of all weights; the least recently used model leaves for another. By default most of
            what is free. A model that alone is larger is loaded alone.
        text_bytes: the most memory of the texts of all models together; by default half of what is free.
        prefix_bytes: the most memory of held prompts, which the models share equally; by default a quarter.
        folder: where held prompts are kept across restarts.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        adapters: Mapping[str, str],
        open: Callable[[str], Source],
        load: Load,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int | None = None,
        text_bytes: int | None = None,
        prefix_bytes: int | None = None,
        folder: Path | None = None,
    ):
        self._load, self._max_rows, self._folder = load, max_rows, folder
        self._clock = count(1)
        self._paths = {path: name for name, path in (*adapters.items(), *names.items())}
        if folder is not None:
            self._paths[str(folder)] = "the prompt cache"
        self.max_bytes = int(_MODELS * backend.free_memory()) if max_bytes is None else max_bytes
        self._text_bytes, self._prefix_bytes = text_bytes, prefix_bytes
        self.entries: dict[str, Entry] = {}
        for name, model in names.items():
            source = open(model)
            nbytes = sum(tensor.nbytes for tensor in source.checkpoint.weights.tensors.values())
            self.entries[name] = Entry(name, model, source.tokenizer, source.config, nbytes)
        for name, path in adapters.items():
            self._add_adapter(name, path)

    def _add_adapter(self, name: str, path: str) -> None:
        """Offer an adapter with the models that it fits; RequestError if there is none."""
        failure: RequestError | None = None
        for entry in self.entries.values():
            try:
                check_fits(read_adapter(path, entry.config), entry.config, f"The adapter {name}")
                entry.adapters[name] = path
            except RequestError as error:
                failure = error
        if failure is not None and not any(name in entry.adapters for entry in self.entries.values()):
            raise failure

    @property
    def residents(self) -> list[Resident]:
        """The models in memory."""
        return [entry.resident for entry in list(self.entries.values()) if entry.resident is not None]

    @property
    def text_bytes(self) -> int:
        """The most memory of all texts together."""
        assert self._text_bytes is not None
        return self._text_bytes

    def find(self, name: str | None) -> tuple[Entry, str | None]:
        """The model and the adapter that a request names, as `model` or `model:adapter`; the default for None.

        Raises:
            APIError: there is none, 404.
        """
        if name is None:
            return next(iter(self.entries.values())), None
        if name in self.entries:
            return self.entries[name], None
        model, _, adapter = name.rpartition(":")
        if model in self.entries and adapter in self.entries[model].adapters:
            return self.entries[model], adapter
        message = f"The model {quote(name)} does not exist; GET /v1/models lists those that do."
        raise APIError(message, 404, param="model", code="model_not_found")

    def names(self) -> list[tuple[str, Entry]]:
        """Every name that a request may give, with its model."""
        return [
            (f"{entry.name}:{adapter}" if adapter else entry.name, entry)
            for entry in self.entries.values()
            for adapter in ("", *entry.adapters)
        ]

    def without_paths(self, text: str) -> str:
        """A message in which the paths that the server was given are replaced by their names."""
        for path, name in sorted(self._paths.items(), key=lambda item: -len(item[0])):
            if "/" in path:
                text = text.replace(path, name)
        return text

    def load_first(self) -> None:
        """Load the models that fit, the first ones first, and read their adapters; errors as `load`."""
        loaded: list[tuple[Entry, OpenELM, OpenELM | None]] = []
        total = 0
        for entry in self.entries.values():
            if loaded and total + entry.nbytes > self.max_bytes:
                continue
            model, _, draft = self._load(entry.source)
            entry.nbytes = _nbytes(model, draft)
            total += entry.nbytes
            loaded.append((entry, model, draft))
        free = backend.free_memory()
        if self._text_bytes is None:
            self._text_bytes = max(1, int(_TEXTS * free))
        if self._prefix_bytes is None:
            self._prefix_bytes = int(_PREFIXES * free)
        for entry, model, draft in loaded:
            self._settle(entry, model, draft)
            for name in entry.adapters:
                pool = entry.resident.pool if entry.resident is not None else None
                assert pool is not None
                pool.release(pool.acquire(name))

    def get(self, entry: Entry, in_use: Sequence[Resident] = ()) -> Resident | None:
        """A model, in memory; None if it has to wait until others have no texts left. Errors as `load`.

        Args:
            in_use: models that are needed for other work than texts.
        """
        if entry.resident is None:
            held = sum(other.nbytes for other in self.residents)
            while self.residents and held + entry.nbytes > self.max_bytes:
                there = [(one, one.resident) for one in self.entries.values() if one.resident is not None]
                idle = [one for one, resident in there if not resident.engine.is_busy and resident not in in_use]
                if not idle:
                    return None
                oldest = min(idle, key=lambda one: one.used)
                held -= oldest.nbytes
                self._drop(oldest)
            log.info("Loading %s, %s", entry.name, size(entry.nbytes))
            model, _, draft = self._load(entry.source)
            entry.nbytes = _nbytes(model, draft)
            self._settle(entry, model, draft)
        entry.used = next(self._clock)
        return entry.resident

    def rebuild(self, resident: Resident) -> None:
        """A new engine for a model in memory, after a failure in the middle of a step."""
        entry = self.entries[resident.name]
        self._settle(entry, resident.model, resident.draft)

    def save(self) -> None:
        """Write held prompts to the folder."""
        if self._folder is not None:
            for resident in self.residents:
                resident.tree.save()

    def _drop(self, entry: Entry) -> None:
        log.info("%s leaves memory for another model", entry.name)
        if entry.resident is not None and self._folder is not None:
            entry.resident.tree.save()
        entry.resident = None
        gc.collect()
        mx.clear_cache()

    def _settle(self, entry: Entry, model: OpenELM, draft: OpenELM | None) -> None:
        """Make the engine of a loaded model."""
        assert self._prefix_bytes is not None
        pool = None
        if entry.adapters:
            pool = AdapterPool(model)
            for name, path in entry.adapters.items():
                pool.add(name, path)
        disk = None
        if self._folder is not None:
            disk = PrefixDisk(self._folder, Origin.of(model, entry.source), model.config)
        tree = PrefixTree(model, self._prefix_bytes // len(self.entries), disk)
        engine = Engine(
            model,
            entry.tokenizer,
            max_rows=self._max_rows,
            max_bytes=self.text_bytes,
            draft_model=draft,
            adapters=pool,
            prefixes=tree,
            # On a CPU each text is, bit for bit, that of a lone run. A GPU's pieces are too long to be held whole.
            exact_prefixes=not backend.on_gpu(),
        )
        entry.resident = Resident(entry.name, model, draft, entry.nbytes, engine, pool, tree)


def _nbytes(model: OpenELM, draft: OpenELM | None) -> int:
    return model_bytes(model) + (0 if draft is None else model_bytes(draft))
