"""The validation loss, the test loss, and the continuations of sample prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ...cuda.compiling import notice
from ..data.batches import Batch
from ..step.evaluation import Evaluation
from .preparing import Prepared
from .request import Request
from .samples import continue_prompts, prompt_tokens


def make_validation(
    request: Request, prepared: Prepared, evaluate: Callable[[Iterable[Batch]], Evaluation]
) -> Callable[[Callable[[], None]], Evaluation] | None:
    """A function that measures the validation loss, as `TrainingRun.evaluate`; None without validation."""
    if "valid" not in prepared.examples:
        return None
    batches = prepared.held_out("valid", request.options.val_batches, request.options, request.processes)
    most = request.processes.largest(len(batches))

    def checked(check: Callable[[], None]) -> Iterator[Batch]:
        for index in range(most):
            request.listener.working("Validating", index, most)
            check()
            with notice("Validating", request.listener.say):
                yield from batches[index : index + 1]

    return lambda check: evaluate(checked(check))


def measure_test_loss(
    request: Request, prepared: Prepared, evaluate: Callable[[Iterable[Batch]], Evaluation]
) -> Evaluation | None:
    """The loss on the test examples; None if it was not asked for."""
    if not request.options.test:
        return None
    batches = prepared.held_out("test", request.options.test_batches, request.options, request.processes)

    def counted() -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            request.listener.working("Testing", index, len(batches))
            with notice("Testing", request.listener.say):
                yield batch
        request.listener.working("Testing", len(batches), len(batches))

    return evaluate(counted())


def continue_samples(request: Request, prepared: Prepared) -> list[str]:
    """The model's continuations of the sample prompts; an empty list in processes that do not lead."""
    options = request.options
    if not (options.sample_prompts and request.processes.leads):
        return []
    tokenizer, report, template = prepared.tokenizer, prepared.main_examples.report, request.loading.chat_template
    prompts = [prompt_tokens(prompt, tokenizer, report, template) for prompt in options.sample_prompts]
    return continue_prompts(prepared.model, tokenizer, prompts, options.sample_tokens)
