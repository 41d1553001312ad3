"""Answers the three kinds of requests that tasks have: likelihoods, likelihoods of whole texts, generated texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..evaluation.likelihoods import DEFAULT_BATCH_SIZE, Likelihood, Request, log_likelihoods
from ..generation.cache_origin import dtype_of, fingerprint
from ..generation.engine import Engine
from ..generation.row import Row
from ..messages import warn
from ..model import OpenELM
from ..text.fingerprint import fingerprint as tokenizer_fingerprint
from ..text.tokenizer import Tokenizer
from ..wording import counted
from .answers import Answers
from .encoding import Encoder
from .generating import options_of, seeded_requests

Progress = Callable[[int, int], None]
# Called with new answers by the number of the request; those of a batch at once.
_Done = Callable[[Mapping[int, Any]], None]


class Scorer:
    """A model that answers requests; the order and the number of requests change no answer.

    On the CPU kernels that holds bit for bit, elsewhere to within rounding.

    Args:
        max_length: the most tokens that the model reads, by default those it was trained on.
        max_gen_toks: the most tokens of a generated text, where a request gives no number.
        keep_bos: whether a prompt that is cut keeps its BOS.
        seed: of sampled texts, whose requests have no seed of their own.
        answers: what is answered already, and where answers are kept; by default in memory.
        progress: called with the number of requests of a kind that are answered, and of all.

    Attributes:
        computed: requests that the model answered so far, and not `answers`.
        listener: called with the kind of a request, its arguments and the answer that the model gave.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        keep_bos: bool = True,
        seed: int = 0,
        answers: Answers | None = None,
        progress: Progress | None = None,
    ):
        if batch_size < 1:
            raise RequestError(f"--batch-size must be 1 or more, got {batch_size}.")
        limit = model.config.rope_max_length
        max_length = model.config.max_context_length if max_length is None else max_length
        if not 2 <= max_length <= limit:
            raise RequestError(f"--max-length must be from 2 to {limit}, got {max_length}.")
        self.model, self.tokenizer, self.batch_size, self.max_gen_toks = model, tokenizer, batch_size, max_gen_toks
        self.seed = seed
        self.encoder = Encoder(tokenizer, max_length, keep_bos=keep_bos)
        self.answers = Answers(self.setting) if answers is None else answers
        self.progress = progress
        self.computed = 0
        self.listener: Callable[[str, Any, Any], None] | None = None

    @property
    def setting(self) -> dict[str, Any]:
        """What an answer depends on besides the request."""
        encoder = self.encoder
        return {
            "model": fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "eos": sorted(self.tokenizer.eos_token_ids),
            "dtype": dtype_of(self.model),
            "max_length": encoder.max_length,
            "max_gen_toks": self.max_gen_toks,
            "keep_bos": encoder.keep_bos,
        }

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each context and continuation the log-likelihood in nats, and whether greedy decoding would give it."""

        def requests(index: int) -> list[Request]:
            return self.encoder.requests(*self.encoder.pair(*pairs[index]))

        return self._likelihoods("loglikelihood", pairs, requests)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text as a whole, in nats, its first token included."""
        found = self._likelihoods("loglikelihood_rolling", [(text,) for text in texts], self._windows_of(texts))
        return [logprob for logprob, _ in found]

    def generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The text that follows each prompt, up to a text of its `until`, to EOS, or to its number of tokens.

        Args:
            prompts: each with lm-eval's arguments of generation; see `generating.options_of`.

        Raises:
            RequestError: an argument that is not known, or no room for a prompt.
        """
        seeded = list(seeded_requests(prompts, self.seed))
        return self._answered(
            "generate_until", prompts, lambda missing, done: self._generate(seeded, missing, done), keyed=seeded
        )

    def _windows_of(self, texts: Sequence[str]) -> Callable[[int], list[Request]]:
        return lambda index: self.encoder.rolling(texts[index])

    def _likelihoods(
        self, method: str, arguments: Sequence[Any], requests: Callable[[int], list[Request]]
    ) -> list[tuple[float, bool]]:
        """The likelihoods of what `requests(index)` splits into parts, as sums of the parts."""

        def compute(missing: Sequence[int], done: _Done) -> None:
            parts: list[Request] = []
            owners: list[int] = []
            left: Counter[int] = Counter()
            sums: dict[int, dict[int, Likelihood]] = {}
            for index in missing:
                own = requests(index)
                if not own:  # the likelihood of nothing
                    done({index: [0.0, True]})
                parts += own
                owners += [index] * len(own)
                left[index], sums[index] = len(own), {}

            def answered(batch: dict[int, Likelihood]) -> None:
                complete = {}
                for part, likelihood in batch.items():
                    index = owners[part]
                    sums[index][part] = likelihood
                    left[index] -= 1
                    if not left[index]:
                        ordered = [found for _, found in sorted(sums.pop(index).items())]
                        total = sum(found.logprob for found in ordered)
                        complete[index] = [total, all(found.is_greedy for found in ordered)]
                done(complete)

            log_likelihoods(self.model, parts, batch_size=self.batch_size, answered=answered)

        return [(logprob, is_greedy) for logprob, is_greedy in self._answered(method, arguments, compute)]

    def _generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]], missing: Sequence[int], done: _Done) -> None:
        engine = Engine(self.model, self.tokenizer, max_rows=self.batch_size, prompts_first=True)
        waiting = []
        for index in missing:
            text, arguments = prompts[index]
            options = options_of(arguments, self.max_gen_toks)
            waiting.append((index, self.encoder.prompt(text, options["max_tokens"]), options))
        waiting.sort(key=lambda one: len(one[1]))  # the longest is taken first, from the end
        rows: list[tuple[int, Row]] = []
        while waiting or rows:
            while waiting and len(rows) < 2 * self.batch_size:
                index, ids, options = waiting.pop()
                rows.append((index, engine.submit(ids, **options)))
            engine.step()
            ended, rows = [one for one in rows if one[1].is_done], [one for one in rows if not one[1].is_done]
            for index, row in ended:
                if row.error is not None:
                    raise row.error
                done({index: row.text})

    def _answered(
        self,
        method: str,
        arguments: Sequence[Any],
        compute: Callable[[Sequence[int], _Done], None],
        *,
        keyed: Sequence[Any] | None = None,
    ) -> list[Any]:
        """The answers to requests: those known already, and the others as `compute` finds them.

        Args:
            keyed: what an answer depends on, if that is not `arguments`.
        """
        seen: Counter[str] = Counter()
        keys = []
        for one in arguments if keyed is None else keyed:
            key = self.answers.key(method, one)
            keys.append(key if not seen[key] else self.answers.key(method, one, seen[key]))
            seen[key] += 1
        found = [self.answers.get(key) for key in keys]
        missing = [index for index, answer in enumerate(found) if answer is None]
        left = len(missing)

        def done(new: Mapping[int, Any]) -> None:
            nonlocal left
            self.answers.add({keys[index]: answer for index, answer in new.items()})
            for index, answer in new.items():
                found[index] = answer
                if self.listener is not None:
                    self.listener(method, arguments[index], answer)
            self.computed += len(new)
            left -= len(new)
            if self.progress is not None:
                self.progress(len(found) - left, len(found))

        self.encoder.cut = 0
        compute(missing, done)
        if self.encoder.cut:
            warn(
                f"{counted(self.encoder.cut, 'prompt')} did not fit into the {self.encoder.max_length} tokens that the "
                "model reads, and lost the beginning."
            )
        return found
