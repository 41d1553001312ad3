"""OpenELM for lm-eval, registered there as `openelm`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Self

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from .. import console
from ..errors import RequestError
from ..loading import load
from .options import batch_size as to_size
from .scorer import Scorer


@register_model("openelm")
class OpenELMLM(TemplateLM):
    """A model that lm-eval measures.

    Args:
        pretrained: the model, as for `load`: `tiny`, `270m`, a hub repository, a folder, a file.
        batch_size: continuations and texts that are processed together; `auto` is the default.
        max_batch_size: the most of them.
        max_length: the most tokens that the model reads, by default those it was trained on.
        max_gen_toks: the most tokens of a generated text, where a task gives no number.
        seed: of sampled texts.
        add_bos_token: must be true: OpenELM was trained with BOS.
        chat_template: `plain`, `corenet` or a jinja file, for `apply_chat_template`; by default the model's own.
        adapter_path, dtype, tokenizer, config_yaml, revision, expand: as for `load`.
        device: ignored, since MLX takes the GPU if there is one; lm-eval's command always gives one.

    Raises:
        RequestError: a bad value, or as `load`.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        add_bos_token: bool = True,
        chat_template: str | None = None,
        adapter_path: Any = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
        config_yaml: str | None = None,
        revision: str | None = None,
        expand: bool | None = None,
        device: str | None = None,
    ):
        if not add_bos_token:
            raise RequestError("OpenELM was trained with BOS, so add_bos_token must be true.")
        size = to_size(batch_size)
        model, text = load(
            pretrained,
            adapter_path,
            dtype,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            revision=revision,
            expand=expand,
            exact_activations=True,
        )
        size = size if max_batch_size is None else min(size, int(max_batch_size))
        scorer = Scorer(model, text, batch_size=size, max_length=max_length, max_gen_toks=max_gen_toks, seed=seed)
        self._begin(scorer, chat_template, pretrained)

    @classmethod
    def of(cls, scorer: Scorer, *, chat_template: str | None = None, name: str = "openelm") -> Self:
        """The model of a scorer."""
        lm = cls.__new__(cls)
        lm._begin(scorer, chat_template, name)
        return lm

    def _begin(self, scorer: Scorer, chat_template: str | None, name: str) -> None:
        super().__init__()
        self.scorer, self.tokenizer, self._template, self._name = scorer, scorer.tokenizer, chat_template, name
        self.batch_size = scorer.batch_size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.scorer.encoder.max_length

    @property
    def max_gen_toks(self) -> int:
        return self.scorer.max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of rendered prompts depends on: the model's name, and the chat template."""
        return f"{self._name}-{self._template or 'own'}".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, add_bos=False)
        return self.scorer.encoder.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.scorer.encoder.pair(context, continuation)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use a cache of lm-eval's (`--use_cache`), of which this model and these settings have a table of their own.

        lm-eval's keys hold the request alone, so that one file would mix up several models.
        """
        super().set_cache_hook(cache_hook)
        if (table := cache_hook.dbdict) is not None:
            table.tablename = "-".join(f"{value}" for value in self.scorer.setting.values())
            table.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
            table.conn.commit()
        self.scorer.listener = self._keep

    def _keep(self, method: str, arguments: Any, answer: Any) -> None:
        """Give lm-eval's cache an answer, in the form of lm-eval."""
        if method == "loglikelihood_rolling":
            answer = answer[0]
        self.cache_hook.add_partial(method, arguments, tuple(answer) if isinstance(answer, list) else answer)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [tuple(request.args) for request in requests]
        with self._progress(disable_tqdm):
            return self.scorer.log_likelihoods(pairs)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """For lm-eval's own helpers, whose requests are encoded already."""
        from ..evaluation.likelihoods import log_likelihoods

        answers = []
        for _text, context, continuation in requests:
            parts = self.scorer.encoder.requests(context, continuation)
            found = log_likelihoods(self.scorer.model, parts, batch_size=self.batch_size)
            answers.append((sum(one.logprob for one in found), all(one.is_greedy for one in found)))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        with self._progress(disable_tqdm):
            return self.scorer.rolling(texts)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [tuple(request.args) for request in requests]
        with self._progress(disable_tqdm):
            return self.scorer.generate(prompts)

    def _progress(self, hidden: bool) -> Any:
        """A progress bar, unless the scorer has one."""
        if hidden or self.scorer.progress is not None:
            return nullcontext()
        return _Bar(self.scorer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name or the source of the template that prompts go through, for lm-eval's records."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            self._template = chat_template
        return self._template or self.tokenizer.chat_template or "corenet"

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, in the template that was chosen, else the model's own, else CoreNet's."""
        return self.tokenizer.apply_chat_template(
            list(chat_history),
            self._template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


class _Bar:
    """Shows a scorer's progress inside the block."""

    def __init__(self, scorer: Scorer):
        self._scorer, self._bar = scorer, console.Progress("Evaluating", unit="requests")

    def __enter__(self) -> None:
        self._scorer.progress = self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._scorer.progress = None
        self._bar.__exit__(*error)
