"""Preference tuning as a whole: exact resume, the reference, all methods and losses, the command and its files."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import get_type_hints

from mlx_openelm import PreferenceOptions, convert, dpo, load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.adapters.switching import without_adapters
from mlx_openelm.cli.main import command as cli_command
from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.hub import catalog
from mlx_openelm.training import config_file
from mlx_openelm.training import finetune as finetune_module
from mlx_openelm.training.data.answers import tokenize_preferences
from mlx_openelm.training.data.kinds import Record
from mlx_openelm.training.data.pairs import PreferenceMaker
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS, FineTuneOptions
from mlx_openelm.training.options import preference as options_module
from mlx_openelm.training.run import metrics as metrics_module
from mlx_openelm.training.run import reference as reference_module
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import Metrics, figure, read
from mlx_openelm.training.step import preference_losses
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.preferences import Preference
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from in_process import run_here
from mlx.utils import tree_flatten, tree_unflatten
from quantization_models import write_tiny
from test_distributed import LAUNCH, launch
from training_runs import WORDS, Notes, command, kill_after, metrics, trained

SHORT = PreferenceOptions(train=True, data="data", iters=5, batch_size=4, learning_rate=1e-2, max_seq_length=48,
                          steps_per_report=2, steps_per_eval=3, val_batches=-1, save_every=2, rank=4)  # fmt: skip


def write_pairs(folder: Path, train: int = 13, valid: int = 5, test: int = 5) -> Path:
    """Random texts in order, and the same words backwards."""
    folder.mkdir()
    draw = random.Random(0)
    for name, number in (("train", train), ("valid", valid), ("test", test)):
        lines = []
        for _ in range(number):
            words = draw.choices(WORDS, k=draw.randint(2, 12))
            prompt, end = " ".join(draw.choices(WORDS, k=draw.randint(1, 6))), " ".join(reversed(words))
            lines.append(json.dumps({"prompt": prompt, "chosen": " " + " ".join(words), "rejected": f" {end} to"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    write_tiny(folder / "model")
    write_pairs(folder / "data")
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A fresh folder to train in, with the model and the data."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_module, "Metrics", partial(Metrics, plot=False))
    return tmp_path


def tune(options: PreferenceOptions = SHORT, listener: Listener | None = None, model: str = "model", **rest):
    return dpo(model, options, listener=listener or Notes(), **rest)


# Whole runs.


def test_a_run_learns_the_preference_and_writes_its_files(here):
    notes = Notes()
    done = tune(
        replace(SHORT, iters=8, learning_rate=2e-2, test=True, sample_prompts=("the king",), sample_tokens=4), notes
    )
    assert done.counts == "pairs" and done.test is not None and done.test.tokens == 5
    assert done.training.trained_tokens == 2 * 13  # 8 steps, of which two have the last pair alone
    rows = read(here / "adapters" / "metrics.jsonl")
    first, last = (row for row in rows if row["step"] in (0, 8) and "val_loss" in row)
    # Before training the model is its own reference, exactly.
    assert first["val_loss"] == pytest.approx(np.log(2)) and first["val_rewards/margins"] == 0
    assert last["val_loss"] < 0.5 and last["val_rewards/accuracies"] > 0.7
    reports = [row for row in rows if "train_loss" in row]
    expected = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected", "logits/chosen", "logits/rejected", "trained_pairs", "pairs_per_second"}  # fmt: skip
    assert expected <= reports[0].keys() and "trained_tokens" not in reports[0]
    record = json.loads((here / "adapters" / "run.json").read_text())
    assert record["kind"] == "dpo" and record["options"]["loss_type"] == ["sigmoid"]
    assert any(line.startswith("chosen: <s>") for line in "\n".join(notes.lines).splitlines())
    assert [sample.prompt for sample in done.samples] == ["the king"]
    load("model", adapter_path="adapters")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": ("hinge",), "beta": 0.01},
        # Both answers of a pair together are longer than a row of a validation.
        {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.2), "packing": True, "max_seq_length": 24},
        {"loss_type": ("orpo",)},
        {"loss_type": ("simpo",), "beta": 2.0},
        {"loss_type": ("kto",)},
        {"loss_type": ("apo_zero",), "reference_free": True},
        {"fine_tune_type": "full", "learning_rate": 1e-3},
        {"fine_tune_type": "dora", "adapter_format": "peft"},
    ],
)
def test_losses_and_methods_train_validate_and_test(here, changes):
    done = tune(replace(SHORT, iters=3, steps_per_eval=3, test=True, **changes))
    rows = [row for row in read(here / "adapters" / "metrics.jsonl") if "val_loss" in row]
    assert rows[-1]["val_rewards/margins"] > rows[0]["val_rewards/margins"]
    assert done.test is not None and np.isfinite(done.test.loss)
    kept = (here / "adapters" / reference_module.FILE).exists()
    assert kept == ("reference_free" not in changes and changes.get("loss_type") not in (("orpo",), ("simpo",)))


def test_a_quantized_model_trains(here):
    convert("model", "packed", quantize=True, q_bits=4, q_group_size=32)
    tune(replace(SHORT, iters=1, val_batches=0), model="packed")
    (base, _), (tuned, _) = load("packed"), load("packed", adapter_path="adapters")
    ids = mx.array([[1, 5, 9, 4]])
    assert mx.abs(tuned(ids) - base(ids)).max().item() > 1e-3


def test_testing_alone_measures_what_training_measured(here):
    trained = tune(replace(SHORT, iters=2, val_batches=0, test=True)).test
    alone = tune(replace(SHORT, train=False, test=True)).test
    assert alone.loss == pytest.approx(trained.loss, rel=1e-5)
    assert alone.metrics == pytest.approx(trained.metrics, rel=1e-4, abs=1e-6)
    base = tune(replace(SHORT, train=False, test=True, adapter_path="")).test
    assert base.loss == pytest.approx(np.log(2)) and base.metrics["rewards/margins"] == 0


# Exact resume.


@pytest.mark.parametrize(
    "extra",
    [
        ("--loss-type", "kto", "--dropout", 0.1),
        *(pytest.param(extra, marks=pytest.mark.slow) for extra in [(), ("--fine-tune-type", "full")]),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(here, extra):
    flags = ("--train", "--model", "model", "--data", "data", "--batch-size", 4, "--max-seq-length", 48, "--iters", 6,
             "--learning-rate", 1e-3, "--steps-per-report", 3, "--steps-per-eval", 4, "--save-every", 2,
             *extra)  # fmt: skip
    whole = run_here("dpo", *flags, "--adapter-path", "whole")
    assert whole.returncode == 0, whole.stderr
    output = kill_after(2, 0.01, *flags, "--adapter-path", "parts", folder=here, name="dpo")
    assert "error" not in output
    last = run_here("dpo", "--resume", "--adapter-path", "parts", "--json")
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["stopped"] == "finished"
    assert trained(here / "parts") == trained(here / "whole")
    assert metrics(here / "parts") == metrics(here / "whole")


def test_each_command_continues_its_own_runs_alone(here):
    tune(replace(SHORT, iters=1))
    other = run_here("lora", "--resume")
    assert other.returncode == 2
    assert "The run in adapters is one of `mlx-openelm dpo`; continue it with that command." in other.stderr
    with pytest.raises(RequestError, match="has loss_type sigmoid, not hinge"):
        tune(replace(SHORT, resume=True, loss_type=("hinge",)))


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
@pytest.mark.parametrize("loss", [pytest.param(loss, marks=pytest.mark.slow) for loss in ("sigmoid", "kto")])
def test_two_processes_train_as_one(here, loss):
    flags = ("--train", "--model", "model", "--data", "data", "--batch-size", 4, "--max-seq-length", 48, "--iters", 4,
             "--optimizer", "sgd", "--learning-rate", 1e-2, "--steps-per-report", 2, "--val-batches", 1,
             "--loss-type", loss)  # fmt: skip
    one = run_here("dpo", *flags, "--adapter-path", "one")
    assert one.returncode == 0, one.stderr
    two = launch(*command(*flags, "--adapter-path", "two", python=(), name="dpo"), folder=here)
    output, _ = two.communicate(timeout=400)
    assert two.returncode == 0, output
    for a, b in zip(metrics(here / "one"), metrics(here / "two"), strict=True):
        # A batch's share of the logits is averaged by the process.
        same = [name for name in a if "logits/" not in name]
        assert {n: b[n] for n in same} == pytest.approx({n: a[n] for n in same}, rel=1e-4, abs=1e-5)


# The reference.


def test_the_reference_is_computed_once_for_a_model_and_its_data(here, monkeypatch):
    computed = []
    compute = reference_module._compute
    monkeypatch.setattr(reference_module, "_compute", lambda *a: computed.append(len(a[1])) or compute(*a))
    tune(replace(SHORT, iters=1))
    assert computed == [13, 5]
    tune(replace(SHORT, iters=1, beta=0.5), overwrite=True)
    assert computed == [13, 5]
    tune(replace(SHORT, iters=1, test=True), overwrite=True)  # the test's alone are missing
    assert computed == [13, 5, 5]
    tune(replace(SHORT, iters=1, max_seq_length=12), overwrite=True)
    assert len(computed) == 5
    write_tiny(here / "other", seed=1)
    tune(replace(SHORT, iters=1, max_seq_length=12), overwrite=True, model="other")
    assert len(computed) == 7


def test_a_damaged_file_of_the_reference_is_computed_again(here, monkeypatch):
    options, path = replace(SHORT, iters=1), here / "adapters" / reference_module.FILE
    tune(options)
    whole = path.read_bytes()
    arrays, keys = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    other = here / "other.safetensors"
    kept = []
    for changed in ({"valid": arrays["valid"]}, arrays | {"valid": arrays["valid"][1:]}):  # a split or a row less
        mx.save_safetensors(str(other), changed, keys)
        kept.append(other.read_bytes())
    compute, computed = reference_module._compute, []
    monkeypatch.setattr(reference_module, "_compute", lambda *a: computed.append(len(a[1])) or compute(*a))
    for damaged in (b"damaged", whole[:-20], *kept):
        path.write_bytes(damaged)
        tune(options, overwrite=True)
        assert path.read_bytes() == whole
    assert computed == [13, 5] * 4


def test_another_model_as_the_reference(here):
    write_tiny(here / "other", seed=1)
    tune(replace(SHORT, iters=1, steps_per_eval=1, ref_model="other"))
    (before, *_) = [row for row in read(here / "adapters" / "metrics.jsonl") if "val_loss" in row]
    assert abs(before["val_rewards/margins"]) > 1e-3
    model, tokenizer = load("model")
    other, _ = load("other")
    rows = [json.loads(line) for line in (here / "data" / "valid.jsonl").read_text().splitlines()]

    def likelihood(model, row, key):
        start = len(tokenizer.encode(row["prompt"]))
        tokens = mx.array([*tokenizer.encode(row["prompt"] + row[key]), tokenizer.eos_token_id])
        logits = model(tokens[None, :-1])[0]
        found = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), tokens[1:, None], -1)
        return found[start - 1 :].sum().item()

    margins = [
        likelihood(model, row, "chosen") - likelihood(other, row, "chosen")
        - likelihood(model, row, "rejected") + likelihood(other, row, "rejected")
        for row in rows
    ]  # fmt: skip
    assert before["val_rewards/margins"] == pytest.approx(0.1 * float(np.mean(margins)), rel=1e-4)
    write_tiny(here / "small", vocab_size=300)
    with pytest.raises(OpenELMError):
        tune(replace(SHORT, ref_model="small"), overwrite=True)


def test_the_reference_has_no_adapter(here):
    """An adapter that is there when the reference is computed is switched off."""
    model, tokenizer = load("model")
    values = [json.loads(line) for line in (here / "data" / "train.jsonl").read_text().splitlines()]
    found = tokenize_preferences([Record(value, "") for value in values], tokenizer, max_seq_length=48)
    compute = partial(reference_module._compute, examples=found.examples, batch_size=4, max_seq_length=48,
                      processes=finetune_module.Processes(), progress=lambda *_: None)  # fmt: skip
    bare = compute(model)
    attach_new(model, rank=4, scale=2.0)
    own = dict(tree_flatten(model.trainable_parameters()))
    model.update(tree_unflatten([(name, mx.ones_like(value)) for name, value in own.items()]))
    tokens = mx.array([[1, 5, 9]])
    changed = model(tokens)
    with without_adapters(model):
        assert not mx.allclose(changed, model(tokens))
    assert mx.array_equal(compute(model), bare)


# The step.


def answers(tokenizer, **options):
    draw = random.Random(3)
    values = [
        {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 9))),
         "chosen": " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9))),
         "rejected": " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))}
        for _ in range(5)
    ]  # fmt: skip
    return tokenize_preferences([Record(v, "") for v in values], tokenizer, max_seq_length=64, **options).examples


@pytest.mark.parametrize("names", [("sigmoid",), ("ipo", "sft"), ("orpo",)])
def test_packed_pairs_and_recomputation_give_the_same_update(here, names):
    _, tokenizer = load("model")
    norms, losses = [], []
    for packed, recompute in ((False, PARTS), (True, PARTS), (False, LAYERS), (False, NOTHING)):
        model, _ = load("model")
        attach_new(model, rank=4, scale=2.0, seed=0)
        items = answers(tokenizer, packing=packed, learns_prompts="orpo" in names)
        reference = [(-10.0 * n, -11.0) for n in range(len(items))]
        make = PreferenceMaker(items, reference, 128 if packed else 64, packed)
        rows = [(0, 3), (1, 2, 4)] if packed else [(n,) for n in (0, 3, 1, 2, 4)]
        batch = make(rows, 0, 1)
        assert (batch.tokens.segments is not None) == packed
        objective = Preference(dict.fromkeys(names, 1.0), uses_reference="orpo" not in names)
        updater = Updater(model, optim.SGD(0.1), objective=objective, recompute=recompute)
        update = updater.update([batch], 5, 0.1, 0)
        losses.append(update.loss.item())
        norms.append(update.grad_norm.item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5) and norms == pytest.approx([norms[0]] * 4, rel=1e-4)
    assert norms[0] > 0


# Options, the command, and the recipes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": ("sigmiod",)}, "loss_type must be .*; did you mean sigmoid"),
        ({"loss_type": ("sigmoid", "kto")}, "loss_type kto cannot be combined with others"),
        ({"loss_type": ("sigmoid", "sigmoid")}, "loss_type names a loss twice"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights must have a number for each of loss_type's 1, got 2"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (0.0, 0.0)}, "loss_weights are all 0, so nothing would be"),
        ({"loss_weights": ("a",)}, "loss_weights must be a list of numbers"),
        ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "label_smoothing is for loss_type sigmoid, sigmoid_norm, "),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, "label_smoothing must be less than 0.5 for robust"),
        ({"loss_type": ("orpo",), "reference_free": True}, "loss_type orpo takes no reference model anyway"),
        ({"loss_type": ("cpo",), "ref_model": "x"}, "ref_model is a reference model, and loss_type cpo takes none"),
        ({"reference_free": True, "ref_model": "x"}, "ref_model is a reference model, and reference_free has none"),
        ({"loss_type": ("sft",), "reference_free": True}, "loss_type sft takes no reference model anyway"),
        ({"loss_type": ("sft",), "beta": 0.5}, "beta is for loss_type sigmoid, .* or kto"),
        ({"loss_type": ("kto",), "loss_weights": (2.0,)}, "loss_weights is for losses of pairs, not for loss_type kto"),
        ({"simpo_gamma": 1.0}, "simpo_gamma is for loss_type simpo"),
        ({"simpo_gamma": 0.0}, "simpo_gamma is for loss_type simpo"),
        ({"desirable_weight": 2.0}, "desirable_weight is for loss_type kto"),
        ({"beta": 0.0}, "beta must be more than 0"),
        ({"max_prompt_length": 48}, "max_prompt_length must be less than max_seq_length"),
        ({"loss_type": ("kto",), "packing": True}, "packing is for pairs, not for loss_type kto"),
        ({"loss_type": ("kto",), "batch_size": 1}, "loss_type kto estimates .*; give batch_size 2 or more"),
        ({"z_loss": 0.1}, "z_loss is for `mlx-openelm lora`"),
        ({"data": None}, "data is needed"),
    ],
)
def test_invalid_requests_are_refused(changes, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        replace(SHORT, **changes).check()


def test_losses_may_be_named_with_commas_as_in_the_flag():
    options = replace(SHORT, loss_type="sigmoid, sft", loss_weights=(1.0, 0.1))
    options.check()
    assert options.weights == {"sigmoid": 1.0, "sft": 0.1}
    with pytest.raises(RequestError, match="loss_type must be .*, got 'sigmod'"):
        replace(SHORT, loss_type="sigmod,sft").check()


def test_the_names_of_losses_have_formulas():
    assert set(preference_losses.COMBINED) == set(options_module.COMBINED)
    assert set(preference_losses.REFERENCE_FREE) == set(options_module.REFERENCE_FREE)


def test_every_option_has_a_flag_with_its_help_text():
    parser, _ = cli_command("dpo")
    hints = get_type_hints(PreferenceOptions, include_extras=True)
    without = {"z_loss", "mask_prompt"}
    for field in fields(PreferenceOptions):
        assert (f"--{field.name.replace('_', '-')}" in parser.flags) == (field.name not in without), field.name
        if field.name not in without:
            text = hints[field.name].__metadata__[0].help
            assert text[0].isupper() and text.endswith("."), field.name


def test_flags_and_files_give_the_same_options(here, monkeypatch):
    seen = []

    def remember(model, options, **rest):
        seen.append(options)
        raise RequestError("Seen.")

    monkeypatch.setattr("mlx_openelm.cli.dpo.dpo", remember)
    (here / "run.yaml").write_text("loss_type: [ipo, sft]\nloss_weights: [0.5, 2]\nbeta: 1e-2\n")
    for words in (
        ["-c", "run.yaml"],
        ["--loss-type", "ipo,sft", "--loss-weights", "0.5,2", "--beta", "0.01"],
        ["--loss-type", "ipo", "--loss-type", "sft", "--loss-weights=.5", "--loss-weights=2", "--beta=.01"],
    ):
        with pytest.raises(SystemExit):
            main(["dpo", *words])  # fmt: skip
    assert seen[0].loss_type == ("ipo", "sft") and seen[0].loss_weights == (0.5, 2.0) and seen[0].beta == 0.01
    assert seen == [seen[0]] * 3


def test_the_command_prints_pairs_accuracy_and_margin(here, monkeypatch):
    drawn = {}
    monkeypatch.setattr(metrics_module, "draw", lambda curves, path, title: drawn.update(curves) or path.touch())
    monkeypatch.setattr(finetune_module, "Metrics", Metrics)  # which plots
    flags = ("--train", "--test", "--model", "model", "--data", "data", "--iters", 2, "--max-seq-length", 48)
    done = run_here("dpo", *flags)
    assert done.returncode == 0, done.stderr
    assert "Trained 2 steps, 8 pairs, " in done.stdout
    assert "Test loss 0." in done.stdout and ", accuracy " in done.stdout and ", 5 pairs" in done.stdout
    assert "Step 0: validation loss 0.693, accuracy 0.0%, margin 0.000" in done.stderr
    assert (here / "adapters" / "losses.png").exists()
    labels = ["loss", "accuracy", "margin", "learning rate"]
    assert [axes.get_ylabel() for axes in figure(drawn).axes] == labels
    done = run_here("dpo", "--train", "--model", "model", "--data", "data", "--loss-weights", "x")
    assert (done.returncode, done.stderr) == (2, "error: --loss-weights must be numbers, got 'x'.\n")


def test_the_plot_shows_accuracy_and_margin():
    curves = {name: [(1, 0.5), (2, 0.75)] for name in ("train_loss", "val_loss", "learning_rate")}
    plain = figure({**curves, "rewards/margins": [], "val_rewards/margins": []})
    assert [axes.get_ylabel() for axes in plain.axes] == ["loss (nats per token)", "learning rate"]
    curves |= {f"{p}rewards/{n}": [(1, 0.5), (2, 0.75)] for p in ("", "val_") for n in ("accuracies", "margins")}
    found = figure(curves)
    assert [axes.get_ylabel() for axes in found.axes] == ["loss", "accuracy", "margin", "learning rate"]
    assert [len(axes.lines) for axes in found.axes] == [3, 2, 2, 1]


RECIPES = {
    "270m": (5, 2e-5, "hinge"),
    "450m": (8, 3e-5, "hinge"),
    "1.1b": (5, 5e-5, "sigmoid"),
    "3b": (10, 1e-4, "hinge"),
}


@pytest.mark.parametrize("size", RECIPES)
def test_apples_recipes(size):
    path = Path(__file__).parent.parent / "lora" / "configs" / f"dpo-{size}.yaml"
    merged = config_file.merge(PreferenceOptions, config_file.read(path), {"data": "d", "train": True})
    options = merged.options
    options.check()
    assert catalog.find(merged.model["model"]) is not None and merged.model["model"] == size
    assert (options.epochs, options.learning_rate, *options.loss_type) == RECIPES[size]
    assert (options.beta, options.max_seq_length, options.max_prompt_length) == (0.01, 1024, 512)
    assert (options.batch_size, options.grad_accumulation_steps, options.optimizer) == (8, 2, "adamw")
    assert (options.lr_schedule, options.fine_tune_type, options.seed) == ("cosine", "full", 42)
    # The defaults of transformers' TrainingArguments, which Apple's file does not change.
    assert (options.weight_decay, options.max_grad_norm) == (0.0, 1.0)
    adamw = make_optimizer(options)
    assert (adamw.betas, adamw.eps, adamw.weight_decay, adamw.bias_correction) == ([0.9, 0.999], 1e-8, 0.0, True)
    steps = 61_000 * options.epochs / 16
    assert options.warmup == pytest.approx(steps / 10, rel=0.02)


def test_options_of_fine_tuning_have_the_same_defaults_but_for_the_length():
    ours, other = PreferenceOptions(), FineTuneOptions()
    changed = {f.name for f in fields(FineTuneOptions) if getattr(ours, f.name) != getattr(other, f.name)}
    assert changed == {"max_seq_length"}
