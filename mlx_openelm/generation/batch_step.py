"""One call of the model for the new tokens of all rows of an engine, and for a piece of one row's prompt.

On the CPU kernels the arithmetic of a step does not depend on the number of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import mlx.core as mx

from ..adapters.pool import AdapterPool
from ..cache import step_caches
from ..model import OpenELM
from ..ops.layers import log_softmax
from .drawing import process_logits
from .drawn import Drawn, Draws
from .row import Row, part
from .speculation import Speculation


class BatchStep:
    """Processes tokens of rows, and starts drawing the next ones.

    Args:
        adapters: where rows have their adapters from.
        draws: gets what is drawn.
        speculation: gives the drafts that a step checks, and learns from it.
    """

    def __init__(self, model: OpenELM, adapters: AdapterPool | None, draws: Draws, speculation: Speculation):
        self._model, self._adapters, self._draws, self._speculation = model, adapters, draws, speculation

    def after_drawn(self, rows: Sequence[Row], drawn: Sequence[Drawn]) -> list[tuple[Row, mx.array]]:
        """Process the drawn and the pending tokens of `rows`.

        The drawn tokens may still be on the device: nothing here waits for them.

        Returns:
            As `_process`.
        """
        taking, parts = [], []
        for group in drawn:
            places = []
            # A row that has more than one token here was drafting, and has ended: otherwise they would be known.
            for row, end in zip(group.rows, accumulate(group.counts), strict=True):
                if not row.is_done and len(row.tokens) + 1 < row.request.count:
                    taking.append(row)
                    places.append(end - 1)
            if places:
                parts.append(group.tokens if len(places) == group.tokens.size else group.tokens[mx.array(places)])
        lengths = [1] * len(taking)
        for row in rows:
            if row.pending and not row.is_done:
                taking.append(row)
                parts.append(mx.array(row.pending))
                lengths.append(len(row.pending))
        if not taking:
            return []
        limited = self._process(taking, parts[0] if len(parts) == 1 else mx.concatenate(parts), lengths)
        if limited:
            mx.async_eval(*(logprobs for _, logprobs in limited))
        return limited

    def after_known(self, rows: Sequence[Row]) -> None:
        """Process the pending tokens of `rows`, none of which has tokens unread, and what they draft after them."""
        rows = [row for row in rows if row.pending and not row.is_done]
        self._speculation.draft(rows)
        rows = [row for row in rows if not row.is_done]
        if rows:
            ids = [[*row.pending, *(() if row.draft is None else row.draft.tokens)] for row in rows]
            self._process(rows, mx.array([token for each in ids for token in each]), [len(each) for each in ids])

    def prompt_piece(self, row: Row, size: int) -> mx.array | None:
        """Process `size` tokens of a row's prompt; after the last ones, the next log-probabilities [1, vocab].

        Caches stay as they were until the next step unless they are quantized.
        """
        piece, row.prompt = row.prompt[:size], row.prompt[size:]
        with self._adapters_of([row], [1]):
            hidden_states = row.decoder.extend(mx.array([piece]))
            states = [layer.state[:2] for layer in row.decoder.cache]
            if row.prompt:
                mx.eval(states)
                mx.clear_cache()
                return None
            logprobs = row.decoder.logprobs(hidden_states)
        if row.decoder.options.kv_bits is not None:
            mx.async_eval(states)
        return logprobs

    def _process(self, rows: list[Row], tokens: mx.array, lengths: list[int]) -> list[tuple[Row, mx.array]]:
        """Process `lengths` more tokens of each row, `tokens` [sum(lengths)], and draw the next ones.

        Returns:
            The rows whose constraint must see a token first, with their next log-probabilities [1, vocab].
        """
        # Nothing is drawn if more tokens are known.
        counts = [0 if row.prompt else 1 if row.draft is None else 1 + len(row.draft.tokens) for row in rows]
        logprobs = self._forward(rows, tokens, lengths, counts)
        self._speculation.began(rows, tokens.size)
        known = {row for row in rows if row.pending}
        for row in rows:
            row.pending = []
        if logprobs is None:
            return []
        plain, places, limited = [], list[range](), []
        for row, count, end in zip(rows, counts, accumulate(counts), strict=True):
            if not count:
                continue
            if row.is_plain and (row.draft is None or row.draft.logprobs is None):
                plain.append(row)
                places.append(range(end - count, end))
            elif row.constraint is not None and row not in known:
                limited.append((row, part(logprobs, end - count, end)))
            else:
                self._draws.start(row, part(logprobs, end - count, end))
        if plain:
            kept = [n for place in places for n in place]
            source = logprobs if len(kept) == len(logprobs) else logprobs[mx.array(kept)]
            self._draws.start_plain(plain, [len(place) for place in places], source)
        return limited

    def _forward(
        self, rows: Sequence[Row], tokens: mx.array, lengths: Sequence[int], counts: Sequence[int]
    ) -> mx.array | None:
        """The log-probabilities [sum(counts), vocab] after the last `counts` of each row's new tokens.

        Args:
            tokens: [sum(lengths)], `lengths` of each row.
        """
        if tokens.size == sum(counts) == 1:
            return self._forward_alone(rows[0], tokens)
        caches = step_caches([row.decoder.cache for row in rows], lengths)
        with self._adapters_of(rows, lengths):
            hidden_states = self._model.hidden_states(tokens[:, None], caches)  # [N, 1, model_dim]
        for row in rows:
            if row.decoder.options.kv_bits is not None:
                row.decoder.quantize_cache()
        ends = list(accumulate(lengths))
        for row, length, end in zip(rows, lengths, ends, strict=True):
            row.see(tokens, end - length, end)
        places = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
        if not places:
            return None
        if len(places) < tokens.size:
            hidden_states = hidden_states[mx.array(places)]
        with self._adapters_of(rows, counts):
            logits = self._model.logits(hidden_states)[:, 0].astype(mx.float32)
        for row, count, end in zip(rows, counts, accumulate(counts), strict=True):
            if row.decoder.logits_processors and count:
                logits[end - count : end] = _processed(row, logits[end - count : end])
        return log_softmax(logits)

    def _forward_alone(self, row: Row, token: mx.array) -> mx.array | None:
        """`_forward` for one token [1] of one row: what a lone run processes, in fewer operations."""
        try:
            with self._adapters_of([row], [1]):
                return row.decoder.step(token)
        except Exception as error:
            row.error = error
            return None

    def _adapters_of(self, rows: Sequence[Row], counts: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, the model's calls have `counts` positions of each row, with its adapter."""
        if self._adapters is None:
            return nullcontext()
        return self._adapters.rows([row.handle for row, count in zip(rows, counts, strict=True) for _ in range(count)])


def _processed(row: Row, logits: mx.array) -> mx.array:
    """The logits [L, vocab] at the last L tokens of a row's context, after its logits processors.

    A processor that fails ends this row alone.
    """
    context, count = row.decoder.context, logits.shape[0]
    try:
        found = [
            process_logits(
                row.decoder.logits_processors,
                context[: context.size - count + place + 1],
                logits[place : place + 1],
            )
            for place in range(count)
        ]
    except Exception as error:
        row.error = error
        return logits
    return mx.concatenate(found)
