"""Fine-tuning compared with mlx-lm's trainer: tokens per second, peak memory, losses.

    python benchmarks/training.py                                  # tiny and the 270M size
    python benchmarks/training.py --size tiny --json
    python benchmarks/training.py --openbookqa openbookqa/train.json   # from LLM-Adapters

Models of the published sizes get random weights. Both programs train the same float32 weights from the same adapter,
with the same optimizer and BLAS, alternating within one process: a step of ours, a step of mlx-lm's. On texts each
program makes its own batches, and only tokens of examples count. Results are medians over all turns. Memory is the peak
of MLX's buffers above the weights, measured in one process per program. mlx-lm's step is that of
`mlx_lm.tuner.trainer.train`.

DPO is compared with mlx-lm-lora's, if that is installed: pairs per second, with all that an epoch over new pairs costs,
our reference pass too. Its memory is compared with that of our own fine-tuning on the same tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import random_model

RANK, SCALE, RATE = 8, 20.0, 1e-5
BATCH_SIZE = 4
# Rows, length: of the equal batches.
SHAPES = {"tiny": (4, 256), "270M": (2, 512)}
BARS = {"equal": 1.05, "openbookqa": 1.15, "mixed": 1.3, "memory": 0.7, "memory, checkpointing": 0.55, "time": 1.05,
        "pairs": 1.3, "memory, dpo": 1.3}  # fmt: skip
# Steps per turn of training on texts.
STEPS = {"tiny": 40, "270M": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", help="tiny, 270M, 450M, 1_1B; repeatable, by default tiny and 270M")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program; results are medians")
    parser.add_argument(
        "--openbookqa", help="openbookqa/train.json of LLM-Adapters; without it those rows are left out"
    )
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "ARGUMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, values = arguments.worker
        print(json.dumps(WORKERS[what](**json.loads(values))))
        return
    rows = []
    for size in arguments.size or ["tiny", "270M"]:
        for row in measure(size, arguments.repeats, arguments.openbookqa, arguments.only):
            rows.append(row)
            if not arguments.json:
                print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measure(size: str, repeats: int, openbookqa: str | None, only: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        folder = str(make_model(size, Path(temporary)))
        for method in ("lora", "full"):
            name = f"equal batches (tokens/s), {method}, {size}"
            if only in name:
                answer = worker("equal", folder=folder, size=size, method=method, turns=repeats)
                yield make_row(name, answer["ours"], answer["mlx-lm"], BARS["equal"])
                name = f"losses of those steps, largest difference, {method}, {size}"
                yield make_row(name, answer["difference"], None, 0.01, larger=False)
            for data in ("openbookqa", "mixed"):
                name = f"{data} (tokens/s), {method}, {size}"
                if only not in name or (data == "openbookqa" and openbookqa is None):
                    continue
                source = openbookqa if data == "openbookqa" else None
                answer = worker("texts", folder=folder, size=size, method=method, turns=repeats, source=source)
                yield make_row(name, answer["ours"], answer["mlx-lm"], BARS[data])
                for whose in ("ours", "mlx-lm"):
                    note = f"  padding of {data}, padding positions per 100 of examples, {whose}"
                    yield make_row(note, answer[f"padding, {whose}"], None, None)
        for checkpointing in (False, True):
            kind = ", checkpointing" if checkpointing else ""
            name = f"peak memory above the weights (MB), lora{kind}, {size}"
            if only in name:
                options = {"folder": folder, "size": size, "grad_checkpoint": checkpointing}
                ours, other, bare = (worker("memory", whose=w, **options) for w in ("ours", "mlx-lm", "without loss"))
                # In a small model temporary buffers outweigh what recomputing saves.
                bar = None if size == "tiny" else BARS[f"memory{kind}"]
                yield make_row(name, ours, other, bar, larger=False)
                yield make_row(
                    f"  the same compared with sum(hidden²) as the loss{kind}", ours, bare, 1.05, larger=False
                )
            name = f"time of a step (s), lora{kind}, {size}"
            if checkpointing and only in name:
                answer = worker("equal", folder=folder, size=size, method="lora", turns=repeats, grad_checkpoint=True)
                tokens = SHAPES.get(size, SHAPES["270M"])
                seconds = [tokens[0] * tokens[1] / answer[whose] for whose in ("ours", "mlx-lm")]
                yield make_row(name, *seconds, BARS["time"], larger=False)
        yield from measure_full_memory(size, folder, only)
        yield from measure_preferences(size, folder, repeats, only)


def measure_full_memory(size: str, folder: str, only: str) -> Iterator[dict[str, Any]]:
    """Rows of full fine-tuning in bfloat16 with both types of Adam's moments; mlx-lm's weights are bfloat16 as well."""
    name = f"peak memory (MB), full in bfloat16, {size}"
    if only in name:
        other = worker("full_memory", whose="mlx-lm", folder=folder, is_compact=False)
        for is_compact in (False, True):
            ours = worker("full_memory", whose="ours", folder=folder, is_compact=is_compact)
            moments = "moments in bfloat16" if is_compact else "moments in float32"
            yield make_row(f"{name}, {moments}", ours, other, None, larger=False)


def measure_preferences(size: str, folder: str, repeats: int, only: str) -> Iterator[dict[str, Any]]:
    name = f"DPO (pairs/s), lora, {size}"
    if only in name and importlib.util.find_spec("mlx_lm_lora") is None:
        print("DPO is left out: mlx-lm-lora is not installed.", file=sys.stderr)
    elif only in name:
        answer = worker("preferences", folder=folder, size=size, turns=repeats)
        yield make_row(name, answer["ours"], answer["mlx-lm-lora"], BARS["pairs"])
        yield make_row(
            "  the same from the second epoch on", answer["ours, known reference"], answer["mlx-lm-lora"], None
        )
        yield make_row("  losses of those steps, largest difference", answer["difference"], None, 0.01, larger=False)
    name = f"peak memory of DPO above the weights (MB), and of fine-tuning on its tokens, lora, {size}"
    if only in name:
        ours, other = (worker("preference_memory", folder=folder, size=size, prefers=p) for p in (True, False))
        yield make_row(name, ours, other, BARS["memory, dpo"], larger=False)


def make_row(name: str, ours: float, other: float | None, bar: float | None, larger: bool = True) -> dict[str, Any]:
    """A row; without a number to compare with, the bar applies to ours."""
    ratio = ours if other is None else ours / other
    passed = bar is None or (ratio >= bar if larger else ratio <= bar)
    return {"name": name, "ours": ours, "other": other, "ratio": None if other is None else ratio, "bar": bar,
            "pass": passed}  # fmt: skip


def as_text(row: dict[str, Any]) -> str:
    other = "" if row["other"] is None else f"  other {row['other']:10.4g}  ratio {row['ratio']:.3f}"
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:64} ours {row['ours']:10.4g}{other}{bar}"


def worker(what: str, **values: Any) -> Any:
    command = [sys.executable, __file__, "--worker", what, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def make_model(size: str, folder: Path) -> Path:
    """A float32 MLX folder: `tiny`, or a published size with random weights."""
    from mlx_openelm import convert
    from mlx_openelm.text.tokenizer import Tokenizer

    tiny = convert("tiny", folder / "tiny", dequantize=True, dtype="float32").path
    if size == "tiny":
        return tiny
    target = folder / size
    random_model.write(size, target)
    Tokenizer.from_folder(tiny).save(target)
    return target


# The rest runs in worker processes.


class Program:
    """A program's model in training: `step` makes one update and waits for it."""

    step: Callable[[Any], float]

    def __init__(self, whose: str, folder: str, method: str, grad_checkpoint: bool = False, **options: Any):
        """`options` are those of `Updater`."""
        import mlx_openelm  # noqa: F401 (the same BLAS for both)

        import mlx.core as mx
        import mlx.optimizers as optim

        self.folder = folder
        optimizer = optim.Adam(RATE)
        if whose == "mlx-lm":
            from mlx_lm.utils import load_model

            self.model, _ = load_model(Path(folder))
            self.step = their_step(self.model, method, optimizer, grad_checkpoint)
        else:
            from mlx_openelm import load

            self.model, self.tokenizer = load(folder)
            self.step = our_step(self.model, method, optimizer, grad_checkpoint, **options)
        mx.eval(self.model.parameters())

    def take_weights_from(self, other: Program) -> None:
        """Copy the other program's trainable parameters, so that both start from the same weights."""
        from mlx.utils import tree_flatten, tree_unflatten

        theirs = dict(tree_flatten(other.model.trainable_parameters()))
        own = [name for name, _ in tree_flatten(self.model.trainable_parameters())]
        assert sorted(own) == sorted(theirs), "the programs train different weights"
        self.model.update(tree_unflatten([(name, theirs[name]) for name in own]))


def our_step(
    model: Any, method: str, optimizer: Any, grad_checkpoint: bool = False, **options: Any
) -> Callable[[Any], float]:
    """A function that makes one update of our model and waits for it: of an adapter, or of all layers' weights.

    `options` are those of `Updater`. Recomputation is what a run with such batches would choose.
    """
    from mlx_openelm.adapters.attaching import attach_new
    from mlx_openelm.training.options import TrainOptions
    from mlx_openelm.training.run.planning import plan
    from mlx_openelm.training.step.updater import Updater

    import mlx.core as mx

    if method == "lora":
        attach_new(model, rank=RANK, scale=SCALE, seed=0)
    else:
        train_layers(model)
    model.train()
    updater = Updater(model, optimizer, **options)
    is_planned = False

    def step(batch: Any) -> float:
        nonlocal is_planned
        if not is_planned:
            train_options = TrainOptions(grad_checkpoint=grad_checkpoint)
            updater.recompute, is_planned = plan(updater, train_options, tokens_of(batch).inputs.shape).recompute, True
        update = updater.update([batch], batch.num_targets, RATE, 0)
        mx.eval(update.loss, update.objective, update.grad_norm, updater.held())
        return float(update.loss.item())

    return step


def tokens_of(batch: Any) -> Any:
    """The tokens of a batch of any kind."""
    return getattr(batch, "tokens", batch)


def their_step(model: Any, method: str, optimizer: Any, grad_checkpoint: bool = False) -> Callable[[Any], float]:
    """The same for mlx-lm, with the step inside mlx_lm.tuner.trainer.train."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if method == "lora":
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    else:
        train_layers(model)
    model.train()
    if grad_checkpoint:
        trainer.grad_checkpoint(model.layers[0])
    value_and_grad = nn.value_and_grad(model, trainer.default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(batch: Any, lengths: Any) -> Any:
        (loss, tokens), gradients = value_and_grad(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss, tokens

    def step(batch: tuple[Any, Any]) -> float:
        loss, tokens = update(*batch)
        mx.eval(state, loss, tokens)
        return float(loss.item())

    return step


def train_layers(model: Any) -> None:
    """Train all layers' weights but not the embedding or the final norm, as mlx-lm's full fine-tuning does."""
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()


def both(folder: str, method: str, grad_checkpoint: bool = False) -> dict[str, Program]:
    programs = {whose: Program(whose, folder, method, grad_checkpoint) for whose in ("ours", "mlx-lm")}
    programs["ours"].take_weights_from(programs["mlx-lm"])
    return programs


def equal(folder: str, size: str, method: str, turns: int, grad_checkpoint: bool = False) -> dict[str, float]:
    """Tokens per second on the same full batches, and the largest relative difference between their losses."""
    programs = both(folder, method, grad_checkpoint)
    seconds: dict[str, list[float]] = {whose: [] for whose in programs}
    losses: dict[str, list[float]] = {whose: [] for whose in programs}
    rows, length = SHAPES.get(size, SHAPES["270M"])
    count = 3 * turns if size != "tiny" else 10 * turns
    for number in range(count + 2):
        for whose, program in programs.items():
            batch = token_batch(whose, rows, length, seed=number % 2)
            started = time.perf_counter()
            losses[whose].append(program.step(batch))
            if number >= 2:  # the first steps trace and compile
                seconds[whose].append(time.perf_counter() - started)
    differences = [abs(a - b) / b for a, b in zip(losses["ours"], losses["mlx-lm"], strict=True)]
    answer = {whose: rows * length / statistics.median(values) for whose, values in seconds.items()}
    return answer | {"difference": max(differences)}


def token_batch(whose: str, rows: int, length: int, seed: int = 0) -> Any:
    """A full batch of random tokens in the program's own format."""
    from mlx_openelm.training.data.batches import Batch

    import mlx.core as mx

    tokens = mx.random.randint(3, 2000, (rows, length + 1), key=mx.random.key(seed))
    mx.eval(tokens)
    if whose == "mlx-lm":
        return tokens, mx.array([[0, length]] * rows)
    return Batch(tokens[:, :-1], tokens[:, 1:], None, tuple(range(rows)), rows * length, rows * length)


def texts(folder: str, size: str, method: str, turns: int, source: str | None) -> dict[str, float]:
    """Example tokens per second on texts; each program makes its own batches."""
    programs = both(folder, method)
    records = instructions(source) if source else mixed_texts()
    sources = {"ours": our_batches(programs["ours"], records), "mlx-lm": their_batches(programs["mlx-lm"], records)}
    rates: dict[str, list[float]] = {whose: [] for whose in programs}
    positions = {whose: [0, 0] for whose in programs}
    for turn in range(turns + 1):
        for whose, program in programs.items():
            counted, spent = 0, 0.0
            for _ in range(STEPS.get(size, STEPS["270M"])):
                started = time.perf_counter()
                batch, tokens, padded = next(sources[whose])
                program.step(batch)
                spent += time.perf_counter() - started
                counted += tokens
                positions[whose][0] += tokens
                positions[whose][1] += padded
            if turn:  # the first turn traces and compiles most shapes
                rates[whose].append(counted / spent)
    answer = {whose: statistics.median(values) for whose, values in rates.items()}
    return answer | {f"padding, {whose}": 100 * (all_ / own - 1) for whose, (own, all_) in positions.items()}


def instructions(path: str) -> list[str]:
    """The examples of LLM-Adapters' file as text, in CoreNet's template."""
    from mlx_openelm.training.data.examples import instruction_prompt

    values = json.loads(Path(path).read_text())
    return [instruction_prompt(item["instruction"], item["input"]) + item["output"] for item in values]


def mixed_texts() -> list[str]:
    """400 texts of 10 to 500 words, most of them short (lognormal lengths)."""
    draw = random.Random(0)
    words = ["the", "king", "and", "all", "his", "men", "rode", "out", "into", "night", "to", "seek", "a", "crown"]
    lengths = [min(500, max(10, round(draw.lognormvariate(4.0, 1.0)))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=length)) for length in lengths]


def our_batches(program: Program, records: Sequence[str]) -> Iterator[tuple[Any, int, int]]:
    """Batches as `mlx-openelm lora` makes them, each with its numbers of tokens and of positions."""
    from mlx_openelm.training.data.batches import Batches
    from mlx_openelm.training.data.examples import tokenize
    from mlx_openelm.training.data.kinds import Record

    examples = tokenize([Record({"text": text}, "") for text in records], program.tokenizer, max_seq_length=1024)
    batches = Batches(examples.examples, batch_size=BATCH_SIZE, max_seq_length=1024, seed=0)
    for index in range(10**9):
        step = batches.step(index)
        yield step.batches[0], step.num_tokens, step.batches[0].inputs.size


def their_batches(program: Program, records: Sequence[str]) -> Iterator[tuple[Any, int, int]]:
    """Batches as mlx_lm.lora makes them of a .jsonl file."""
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.trainer import iterate_batches
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(Path(program.folder))
    data = CacheDataset(TextDataset([{"text": text} for text in records], tokenizer))
    for batch, lengths in iterate_batches(data, BATCH_SIZE, 1025, loop=True, seed=0):
        yield (batch, lengths), int((lengths[:, 1] - 1).sum().item()), batch[:, 1:].size


def memory(whose: str, folder: str, size: str, grad_checkpoint: bool) -> float:
    """The peak memory of the third LoRA step above the weights, in MB (1e6 bytes)."""
    import mlx_openelm  # noqa: F401 (before MLX)
    from mlx_openelm.training.step.objectives import CrossEntropy, Forward, Sums

    import mlx.core as mx

    class Squares(CrossEntropy):
        """A loss without logits."""

        def __call__(self, forward: Forward, arrays: Any) -> Sums:
            total = mx.sum(mx.square(forward.hidden_states(*arrays[:2])))
            return Sums(total, total)

    options = {}
    if whose == "without loss":
        whose, options = "ours", {"objective": Squares()}
    program = Program(whose, folder, "lora", grad_checkpoint, **options)
    mx.clear_cache()
    weights = mx.get_active_memory()
    for _ in range(3):
        batch = token_batch(whose, *SHAPES.get(size, SHAPES["270M"]))
        mx.clear_cache()
        mx.reset_peak_memory()
        program.step(batch)
    return (mx.get_peak_memory() - weights) / 1e6


def full_memory(whose: str, folder: str, is_compact: bool) -> float:
    """The peak memory of the third step of full fine-tuning in bfloat16, the model included, in MB (1e6 bytes)."""
    import mlx_openelm  # noqa: F401 (before MLX)
    from mlx_openelm import load

    import mlx.core as mx
    import mlx.optimizers as optim

    if whose == "ours":
        model, _ = load(folder, dtype="bfloat16")
        options = {"compute_dtype": mx.bfloat16, "is_compact": is_compact}
        step = our_step(model, "full", optim.Adam(RATE), **options)
    else:
        from mlx_lm.utils import load_model

        model, _ = load_model(Path(folder))
        model.set_dtype(mx.bfloat16)
        mx.eval(model.parameters())
        step = their_step(model, "full", optim.Adam(RATE))
    for _ in range(3):
        batch = token_batch(whose, 1, 8)  # what is held counts; a CPU is slow in bfloat16
        mx.clear_cache()
        mx.reset_peak_memory()
        step(batch)
    return mx.get_peak_memory() / 1e6


def preferences(folder: str, size: str, turns: int) -> dict[str, float]:
    """Pairs per second of both programs on the same batches, with and without our reference pass."""
    import mlx_openelm  # noqa: F401 (the same BLAS for both)
    from mlx_openelm.adapters.switching import without_adapters
    from mlx_openelm.training.step.objectives import Forward
    from mlx_openelm.training.step.preferences import Preference, answer_arrays, answered

    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.utils import load_model

    model, reference = (load_model(Path(folder))[0] for _ in range(2))
    step_of_theirs = their_preference_step(model, reference.freeze(), optim.Adam(RATE))
    ours = Program("ours", folder, "lora", objective=Preference({"sigmoid": 1.0}))
    theirs = Program.__new__(Program)
    theirs.model = model
    ours.take_weights_from(theirs)
    items = preference_answers(size)
    seconds: dict[str, list[float]] = {"ours": [], "ours, known reference": [], "mlx-lm-lora": []}
    differences = []
    for number in range(2 + 3 * turns):
        part = items[number % 3 :: 3]
        started = time.perf_counter()
        with without_adapters(ours.model):
            totals = answered(Forward(ours.model, differentiable=False), answer_arrays(preference_batch(part))).totals
            known = totals.reshape(-1, 2).tolist()
        between = time.perf_counter()
        batch = preference_batch(part, known)
        loss = ours.step(batch)
        after = time.perf_counter()
        other = step_of_theirs(their_preference_batch(part))
        ended = time.perf_counter()
        if number >= 3:  # the first steps trace and compile
            differences.append(abs(loss - other) / abs(other))
            seconds["ours"].append(after - started)
            seconds["ours, known reference"].append(after - between)
            seconds["mlx-lm-lora"].append(ended - after)
        mx.clear_cache()
    answer = {whose: BATCH_SIZE * len(values) / sum(values) for whose, values in seconds.items()}
    return answer | {"difference": max(differences)}


def preference_answers(size: str) -> list[Any]:
    """Three batches of pairs: prompts of 40 to 200 tokens, completions of 20 to 120; for `tiny` a quarter of that."""
    from array import array

    from mlx_openelm.training.data.answers import Answer, Answers

    draw, share = random.Random(0), 4 if size == "tiny" else 1
    items = []
    for _ in range(3 * BATCH_SIZE):
        prompt = [1, *(draw.randint(3, 2000) for _ in range(draw.randint(40, 200) // share))]
        answers = []
        for _ in range(2):
            tokens = [*prompt, *(draw.randint(3, 2000) for _ in range(draw.randint(20, 120) // share))]
            answers.append(Answer(array("i", tokens), ((len(prompt), len(tokens)),), "", len(prompt)))
        items.append(Answers((answers[0], answers[1]), ""))
    return items


def preference_batch(items: Sequence[Any], reference: Any = None) -> Any:
    """A batch of our DPO."""
    from mlx_openelm.training.data.pairs import PreferenceMaker

    make = PreferenceMaker(items, reference or [(0.0, 0.0)] * len(items), 1024)
    return make([(index,) for index in range(len(items))], 0, 1)


def their_preference_batch(items: Sequence[Any]) -> Any:
    """The same batch as mlx_lm_lora.trainer.dpo_trainer.iterate_dpo_batches makes it."""
    from mlx_lm_lora.trainer.dpo_trainer import iterate_dpo_batches

    rows = [
        {f"{key}{what}": value for key, answer in zip(("chosen", "rejected"), item.answers, strict=True)
         for what, value in (("", list(answer.tokens)), ("_prompt_length", answer.start))}
        for item in items
    ]  # fmt: skip
    return next(iter(iterate_dpo_batches(rows, len(rows), 1024)))


def their_preference_step(model: Any, reference: Any, optimizer: Any) -> Callable[[Any], float]:
    """An update of mlx-lm-lora, with the step inside mlx_lm_lora.trainer.dpo_trainer.train_dpo."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer import dpo_trainer

    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    model.train()
    state = [model.state, optimizer.state, mx.random.state]

    def loss(*batch: Any) -> Any:
        scores = []
        for who in (model, reference):
            for tokens, mask in zip(batch[:2], batch[2:], strict=True):
                found = dpo_trainer.get_token_scores(who, tokens, mask)
                scores.append(dpo_trainer.compute_score(found, mask, "sigmoid"))
        scores[2:] = map(mx.stop_gradient, scores[2:])
        return dpo_trainer.dpo_loss(*scores, *batch[2:], beta=0.1, delta=50.0, loss_type="sigmoid")

    value_and_grad = nn.value_and_grad(model, loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def update(batch: Any) -> Any:
        (value, *_), gradients = value_and_grad(*batch)
        optimizer.update(model, gradients)
        return value

    def step(batch: Any) -> float:
        value = update(batch)
        mx.eval(state, value)
        return float(value.item())

    return step


def preference_memory(folder: str, size: str, prefers: bool) -> float:
    """The peak memory above the weights of a step of DPO, or of fine-tuning on the same tokens, in MB (1e6 bytes)."""
    import mlx_openelm  # noqa: F401 (before MLX)
    from mlx_openelm.training.step.objectives import CrossEntropy
    from mlx_openelm.training.step.preferences import Preference

    import mlx.core as mx

    program = Program("ours", folder, "lora", objective=Preference({"sigmoid": 1.0}) if prefers else CrossEntropy())
    batch = preference_batch(preference_answers(size)[:BATCH_SIZE])
    mx.clear_cache()
    weights = mx.get_active_memory()
    for _ in range(3):
        mx.clear_cache()
        mx.reset_peak_memory()
        program.step(batch if prefers else batch.tokens)
    return (mx.get_peak_memory() - weights) / 1e6


WORKERS: dict[str, Callable[..., Any]] = {
    "equal": equal,
    "texts": texts,
    "memory": memory,
    "full_memory": full_memory,
    "preferences": preferences,
    "preference_memory": preference_memory,
}

if __name__ == "__main__":
    main()
