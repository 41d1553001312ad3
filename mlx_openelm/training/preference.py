"""Preference tuning: from a model's name and a folder of preferences to an adapter (`mlx-openelm dpo`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..errors import RequestError, name_options
from ..loading import load
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .data.answers import Preferences, tokenize_preferences
from .data.kinds import Record
from .data.pairs import PreferenceBatches, PreferenceMaker
from .data.preferences import PREFERENCE_KINDS
from .finetune import FineTuned, tune
from .options.preference import PreferenceOptions
from .run import reference
from .run.listener import Listener
from .run.method import Method
from .run.preparing import Loading, Prepared, prepare
from .run.request import Request
from .step.objectives import Objective
from .step.preference_losses import Settings
from .step.preferences import LabeledPreference, Preference

_DEFAULT_LOADING = Loading()


def dpo(
    model: str | Path,
    options: PreferenceOptions,
    *,
    loading: Loading = _DEFAULT_LOADING,
    overwrite: bool = False,
    listener: Listener | None = None,
    progress: bool | None = True,
) -> FineTuned:
    """Train an adapter, or the weights themselves, on preferences between answers; test it; or both.

    The loss is DPO's, or that of one of its relatives: see `PreferenceOptions.loss_type`. The log-probabilities of the
    answers in the reference model are computed once before training and kept in `reference.safetensors`, beside the
    files that `finetune` writes.

    Args:
        model: as `load` takes it.
        overwrite: replace the run that is in `options.adapter_path`.
        listener: its callbacks report the run, in place of the lines and the bar that are shown by default.
        progress: whether to show the run, if there is no `listener`.

    Raises:
        RequestError: a request that cannot work; nothing was trained.
        OpenELMError: a loss that is not finite, a full disk, or a lost process; the last checkpoint is intact.
    """
    return tune(PREFERENCE_TUNING, model, options, loading, overwrite, listener, progress)


class PreferenceTuning(Method):
    """Training on preferences; the options of its requests are `PreferenceOptions`."""

    options = PreferenceOptions
    batches_type = PreferenceBatches

    def prepare(self, request: Request) -> Prepared:
        """Load the model and the preferences."""
        options = _options(request)

        def tokenize(split: str, records: Sequence[Record], tokenizer: Tokenizer, max_seq_length: int) -> Preferences:
            return tokenize_preferences(
                records,
                tokenizer,
                max_seq_length=max_seq_length,
                max_prompt_length=options.max_prompt_length,
                labeled=options.labeled,
                learns_prompts="orpo" in options.loss_type,
                chat_template=request.loading.chat_template,
                refuse_long=options.long_examples == "refuse",
                packing=options.packs(split),
                progress=partial(request.listener.working, f"Tokenizing {split}"),
            )

        return prepare(
            request.model, options, request.loading, request.listener, kinds=PREFERENCE_KINDS, tokenize=tokenize
        )

    def complete(self, request: Request, prepared: Prepared, *, keep: bool) -> None:
        """Compute the reference's log-probabilities, or read them."""
        options = _options(request)
        splits = {name: split for name, split in prepared.examples.items() if isinstance(split, Preferences)}
        if options.uses_reference:
            if options.resume_adapter_file is not None and options.ref_model is None:
                request.listener.say(
                    "The reference is the model without the adapter that training starts from; to make that one part "
                    "of the reference too, fuse it into the model first (`mlx-openelm fuse`)."
                )
            likelihoods = reference.reference_likelihoods(
                partial(_reference_model, request, prepared),
                splits,
                folder=request.folder if options.adapter_path else None,
                name=options.ref_model or request.model,
                keep=keep,
                batch_size=options.batch_size,
                max_seq_length=prepared.max_seq_length,
                processes=request.processes,
                progress=lambda split, done, total: request.listener.working(
                    f"Reference log-probabilities of {split}", done, total
                ),
            )
        else:
            likelihoods = reference.zeros(splits)
        for name, split in splits.items():
            packed = options.packs(name)
            length = prepared.max_seq_length * (2 if packed else 1)
            prepared.makers[name] = PreferenceMaker(split.examples, likelihoods[name], length, packed)

    def objective(self, request: Request) -> Objective:
        """The loss that the options choose."""
        options = _options(request)
        desirable, undesirable = options.label_weights
        settings = Settings(
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            cpo_alpha=options.alpha_of_likelihood,
            simpo_gamma=options.margin,
            desirable_weight=desirable,
            undesirable_weight=undesirable,
        )
        if options.labeled:
            return LabeledPreference(settings, options.uses_reference)
        return Preference(options.weights, settings, options.uses_reference)

    def counts(self, request: Request) -> str:
        """What a step counts."""
        return "answers" if _options(request).labeled else "pairs"

    def title(self, request: Request) -> str:
        """The beginning of the plot's title."""
        return f"Preference tuning ({' + '.join(_options(request).loss_type)}) of"


PREFERENCE_TUNING = PreferenceTuning()


def _options(request: Request) -> PreferenceOptions:
    assert isinstance(request.options, PreferenceOptions)
    return request.options


def _reference_model(request: Request, prepared: Prepared) -> OpenELM:
    """The model before training, or the one of `--ref-model`.

    Raises:
        RequestError: its vocabulary is not that of the model.
    """
    name = _options(request).ref_model
    if name is None:
        return prepared.model
    loading = request.loading
    model, _ = load(name, dtype=loading.dtype, tokenizer=loading.tokenizer, exact_activations=True)
    if model.config.vocab_size != prepared.model.config.vocab_size:
        raise RequestError(
            name_options(
                f"--ref-model {name} has a vocabulary of {model.config.vocab_size:,}, not "
                f"{prepared.model.config.vocab_size:,} as the model; it must have the same tokenizer."
            )
        )
    return model
