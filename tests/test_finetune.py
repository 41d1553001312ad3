"""Fine-tuning as a whole: exact resume, the methods, the files in the folder, and the requests that are refused."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_openelm import convert
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.loading import load
from mlx_openelm.training import finetune as finetune_module
from mlx_openelm.training.finetune import FineTuned, Loading, finetune, saved_options
from mlx_openelm.training.options import FineTuneOptions
from mlx_openelm.training.run import method as method_module
from mlx_openelm.training.run import preparing
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import Metrics
from mlx_openelm.training.run.state import Checkpoints
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import numpy as np
import pytest
from in_process import run_here
from mlx.utils import tree_flatten
from training_runs import Notes, kill_after, metrics, trained, write_data, write_run_folder

# Seven steps per epoch, and something to save at nearly every step.
SHORT = FineTuneOptions(train=True, data="data", iters=9, batch_size=4, learning_rate=1e-2, max_seq_length=48,
                        steps_per_report=2, steps_per_eval=3, val_batches=-1, save_every=2, keep_last=2, rank=4,
                        dropout=0.1, optimizer="adamw", lr_schedule="cosine", warmup=2, max_grad_norm=1.0)  # fmt: skip
# What a run leaves or refuses, however long it was; its learning rate falls to zero as in `SHORT`.
BRIEF = replace(SHORT, iters=3, warmup=1)
# The programs whose files are compared with those of this process compute on the CPU, as it does.
ON_CPU = ("-c", "import sys; from mlx_openelm.cli.main import main; import mlx.core as mx; "
                "mx.set_default_device(mx.cpu); main(sys.argv[1:])")  # fmt: skip
FLAGS = ("--train", "--model", "model", "--data", "data", "--batch-size", 4, "--max-seq-length", 48,
         "--learning-rate", 1e-2, "--rank", 4, "--dropout", 0.1, "--optimizer", "adamw", "--lr-schedule", "cosine",
         "--warmup", 2, "--steps-per-report", 3, "--steps-per-eval", 5, "--val-batches", -1)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run_folder(tmp_path_factory.mktemp("finetune"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A fresh folder to train in, with the model and the data."""
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    # Plots take a second each, and are tested elsewhere.
    monkeypatch.setattr(finetune_module, "Metrics", partial(Metrics, plot=False))
    return tmp_path


def tune(options: FineTuneOptions = SHORT, listener: Listener | None = None, **rest) -> FineTuned:
    return finetune("model", options, listener=listener, **rest)


# Exact resume.


def _kill_and_resume(folder: Path, flags: tuple, kills: int, seed: int) -> None:
    """Kill a run at random times and resume it; it must leave the same files as an uninterrupted run."""
    whole = run_here("lora", *flags, "--adapter-path", "whole", folder=folder)
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(seed)
    for attempt in range(kills):
        words = flags if attempt == 0 else ("--resume",)
        output = kill_after(draw.randint(1, 5), draw.random() * 0.05, *words, "--adapter-path", "parts", folder=folder,
                            start=ON_CPU)  # fmt: skip
        assert "error" not in output and "damaged" not in output, output
    last = run_here("lora", "--resume", "--adapter-path", "parts", "--json", folder=folder)
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["stopped"] == "finished"
    assert trained(folder / "parts") == trained(folder / "whole")
    assert metrics(folder / "parts") == metrics(folder / "whole")
    names = [sorted(p.name for p in (folder / name / "checkpoints").iterdir()) for name in ("parts", "whole")]
    assert names[0] == names[1]


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(here):
    _kill_and_resume(here, (*FLAGS, "--iters", 12, "--save-every", 1), 1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    ("--fine-tune-type", "dora", "--grad-accumulation-steps", 2),
    ("--fine-tune-type", "full", "--optimizer", "muon", "--rank", 4, "--dropout", 0),
    ("--packing", "--optimizer", "sgd", "--momentum", 0.9),
    ("--optimizer", "adafactor", "--target-modules", "qkv_proj,token_embeddings", "--adapter-format", "mlx"),
])  # fmt: skip
def test_a_run_killed_many_times_equals_an_uninterrupted_one(here, extra):
    # The last of several repeated flags counts.
    _kill_and_resume(here, (*FLAGS, "--iters", 60, "--save-every", 1, *extra), 8, seed=len(extra))


def test_a_run_stopped_at_any_step_equals_an_uninterrupted_one(here):
    options = replace(SHORT, iters=6)
    tune(replace(options, adapter_path="whole"))
    for end in (1, 2, 5):
        listener = Notes()
        # With fewer --iters the cosine would differ, so an error stops the run instead.
        _stop_after(end, replace(options, adapter_path="parts", resume=end > 1, save_every=1), listener)
    done = tune(replace(options, adapter_path="parts", resume=True, save_every=1))
    assert done.training.stopped == "finished"
    assert trained(here / "parts") == trained(here / "whole") and metrics(here / "parts") == metrics(here / "whole")


def _stop_after(steps: int, options: FineTuneOptions, listener: Listener) -> None:
    update = Updater.update

    def stop(self, batches, num_targets, learning_rate, step):
        if step == steps:
            raise OpenELMError("stopped")
        return update(self, batches, num_targets, learning_rate, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", stop)
        with pytest.raises(OpenELMError, match="stopped"):
            tune(options, listener)


def test_a_damaged_checkpoint_is_reported_and_the_run_ends_the_same(here):
    options = replace(SHORT, iters=5, steps_per_eval=2)
    tune(replace(options, adapter_path="whole"))
    _stop_after(4, replace(options, adapter_path="parts"), Notes())
    newest = here / "parts" / "checkpoints" / "0000004" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    notes = Notes()
    tune(replace(options, adapter_path="parts", resume=True), notes)
    assert any("0000004 is damaged: weights.safetensors has" in line for line in notes.lines)
    assert "Resuming after step 2." in notes.lines
    assert trained(here / "parts") == trained(here / "whole") and metrics(here / "parts") == metrics(here / "whole")


# Refusals.


def test_a_folder_with_a_run_is_not_overwritten(here):
    tune(BRIEF)
    before = trained(here / "adapters")
    with pytest.raises(RequestError, match="adapters holds a run already; .*resume.*overwrite=True"):
        tune(BRIEF)
    assert trained(here / "adapters") == before
    (here / "adapters" / "notes.txt").write_text("mine")
    rows = len(metrics(here / "adapters"))
    tune(replace(BRIEF, seed=1), overwrite=True)
    assert (here / "adapters" / "notes.txt").read_text() == "mine"
    assert trained(here / "adapters") != before and len(metrics(here / "adapters")) == rows > 2
    with pytest.raises(RequestError, match="give one of them"):
        tune(replace(BRIEF, resume=True), overwrite=True)
    (here / "adapters" / "run.json").write_text("{")
    with pytest.raises(RequestError, match="run.json is damaged; replace it with overwrite=True") as refused:
        tune(BRIEF)
    assert "resume" not in str(refused.value)


def test_a_folder_with_only_an_adapter_is_not_overwritten(here):
    (here / "adapters").mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        (here / "adapters" / name).write_text("mine")
    with pytest.raises(RequestError, match="holds an adapter already; replace it with overwrite=True") as refused:
        tune()
    assert "resume" not in str(refused.value)


def test_resuming_a_complete_run_reports_that_it_is_complete(here):
    tune(BRIEF)
    notes = Notes()
    tune(replace(BRIEF, resume=True), notes)
    assert "The run is complete, after 3 steps; raise iters to go on." in notes.lines
    assert not any(line.startswith("Going on") for line in notes.lines)


def test_testing_on_one_file_uses_all_of_it_and_says_so(here):
    notes = Notes()
    alone = FineTuneOptions(test=True, data="data/train.jsonl", adapter_path="", max_seq_length=48, test_batches=1)
    tune(alone, notes)
    line = "train.jsonl is used for testing as a whole; it should not contain training examples."
    assert notes.lines.count(line) == 1
    notes = Notes()
    tune(replace(alone, data="data"), notes)
    assert line not in notes.lines


def test_nothing_is_overwritten_before_all_checks_pass(here):
    tune(BRIEF)
    before = trained(here / "adapters")
    with pytest.raises(RequestError, match="num_layers must be"):
        tune(replace(SHORT, num_layers=9), overwrite=True)
    with pytest.raises(RequestError, match="rank 4.*rank 4"):
        tune(replace(SHORT, rank=3, resume_adapter_file="adapters/adapters.safetensors"), overwrite=True)
    assert trained(here / "adapters") == before


def test_resuming_needs_a_run_but_no_checkpoint(here):
    with pytest.raises(RequestError, match="no run in adapters to resume"):
        tune(replace(SHORT, resume=True))
    assert not (here / "adapters").exists()
    # Killed before the first checkpoint: it starts from the beginning.
    tune(BRIEF)
    shutil.rmtree(here / "adapters" / "checkpoints")
    notes, before = Notes(), (here / "adapters" / "adapters.safetensors").read_bytes()
    done = tune(replace(BRIEF, resume=True), notes)
    assert "Nothing was saved before the run stopped; it starts from the beginning." in notes.lines
    assert done.training.steps == 3 and (here / "adapters" / "adapters.safetensors").read_bytes() == before


def test_a_different_run_cannot_be_resumed(here):
    _stop_after(2, BRIEF, Notes())
    lines = (here / "data" / "train.jsonl").read_text().splitlines()
    shutil.copytree(here / "data", here / "other")
    (here / "other" / "train.jsonl").write_text("\n".join([*lines[:-1], lines[0]]))
    for changes, named in (
        ({"rank": 5}, "rank 4, not 5"),
        ({"batch_size": 2}, "batch_size 4, not 2"),
        ({"seed": 3}, "seed 0, not 3"),
        ({"packing": True}, "packing off, not on"),
        ({"target_modules": ("qkv_proj",)}, "target_modules unset, not qkv_proj"),
        ({"data": "other"}, "not what this run learned from"),
    ):
        with pytest.raises(RequestError, match=named):
            tune(replace(BRIEF, resume=True, **changes))
    shutil.copytree(here / "data", here / "moved")  # the same data under another path
    free = {"data": "moved", "steps_per_report": 1, "save_every": 3, "keep_last": 1, "iters": 3}
    assert tune(replace(BRIEF, resume=True, **free)).training.steps == 3


def test_a_run_cannot_be_shortened_below_its_steps_so_far(here):
    tune(BRIEF)
    before = (here / "adapters" / "run.json").read_text()
    with pytest.raises(RequestError, match="after step 3 already; iters must be at least that"):
        tune(replace(BRIEF, resume=True, iters=2))
    assert (here / "adapters" / "run.json").read_text() == before


def test_a_run_cannot_be_resumed_with_another_model(here):
    _stop_after(2, BRIEF, Notes())
    shutil.copytree(here / "model", here / "model2")
    with pytest.raises(RequestError, match="model model, not model2"):
        finetune("model2", replace(BRIEF, resume=True))
    with pytest.raises(RequestError, match="dtype unset, not bfloat16"):
        tune(replace(BRIEF, resume=True), loading=Loading(dtype="bfloat16"))


def test_changes_allowed_on_resume_are_reported(here):
    _stop_after(2, BRIEF, Notes())
    notes = Notes()
    tune(replace(BRIEF, resume=True, learning_rate=1e-3, iters=4), notes)
    assert any(
        line.startswith("learning_rate is 0.001, 0.01 in adapters/run.json; from here on the run differs")
        for line in notes.lines
    )
    assert any("another length" in line for line in notes.lines)
    record = json.loads((here / "adapters" / "run.json").read_text())
    assert record["options"]["learning_rate"] == 1e-3 and len(record["resumed"]) == 1
    assert saved_options("adapters")["learning_rate"] == 1e-3


def test_two_runs_in_one_folder_are_refused(here):
    class Second(Listener):
        def saved(self, step, path):
            with pytest.raises(RequestError, match="Another process is training into adapters"):
                tune(BRIEF, overwrite=True)

    assert tune(BRIEF, Second()).training.steps == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": False}, "train"),
        ({"train": False, "test": True, "adapter_path": "nowhere/at/all"}, "no adapter in nowhere/at/all"),
        ({"resume_adapter_file": "nothing.safetensors"}, "resume_adapter_file nothing.safetensors does not exist"),
        ({"adapter_path": "data/train.jsonl"}, "is a file"),
        ({"data": "data/none.jsonl"}, "data/none.jsonl"),
        ({"num_layers": 3}, "num_layers must be from 1 to 2"),
        ({"early_stop": 1, "data": "data/train.jsonl", "valid_fraction": 0.0}, "early_stop needs validation data"),
    ],
)
def test_invalid_requests_are_refused(here, changes, named):
    with pytest.raises(RequestError, match=named):
        tune(replace(SHORT, **changes))
    assert not (here / "adapters" / "run.json").exists()


def test_bad_requests_are_refused_before_the_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr(preparing, "load", lambda *_, **__: pytest.fail("it was loaded"))
    (here / "adapters").mkdir()
    (here / "adapters" / "run.json").write_text("{}")
    for changes in ({}, {"resume": True}, {"data": "nowhere.jsonl"}, {"rank": 0}):
        with pytest.raises(RequestError):
            tune(replace(SHORT, **changes), overwrite=changes == {"data": "nowhere.jsonl"})
    with pytest.raises(RequestError, match="chat template"):
        tune(replace(SHORT, adapter_path="new"), loading=Loading(chat_template="missing.jinja"))


def test_a_quantized_model_trains_with_adapters_and_with_full_weights(here):
    convert("model", "small", quantize=True, q_group_size=32)
    for kind, rate in (("lora", 1e-2), ("full", 1e-3)):
        options = replace(SHORT, iters=4, dropout=0.0, fine_tune_type=kind, learning_rate=rate, num_layers=1, test=True,
                          adapter_path=kind)  # fmt: skip
        done = finetune("small", options)
        assert done.training.val_loss < metrics(here / kind)[0]["val_loss"]
        again = finetune("small", replace(options, train=False))
        assert again.test.loss == pytest.approx(done.test.loss, rel=1e-5)
        # Also without unpacking: the trained weights replace packed ones.
        model, _ = load("small", adapter_path=kind, expand=False, exact_activations=True)
        expanded, _ = load("small", adapter_path=kind, expand=True)
        tokens = mx.array([[1, 5, 6, 7]])
        assert mx.allclose(model(tokens), expanded(tokens), rtol=1e-3, atol=1e-3).item()


# The methods, and the files they leave.


def _weights(name: str = "model", **options) -> dict[str, np.ndarray]:
    model, _ = load(name, **options)
    return {path: np.array(value) for path, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, None),
        ({"num_layers": 1}, "transformer.layers.1."),
    ],
)
def test_full_fine_tuning_changes_only_the_chosen_weights(here, options, changed):
    done = tune(replace(SHORT, iters=4, fine_tune_type="full", dropout=0.0, learning_rate=1e-3, **options))
    before, after = _weights(), _weights(adapter_path="adapters")
    assert before.keys() == after.keys()
    for name in before:
        same = np.array_equal(before[name], after[name])
        assert same == (changed is not None and not name.startswith(changed)), name
    expected = sum(v.size for n, v in before.items() if changed is None or n.startswith(changed))
    assert (done.trained_parameters, done.total_parameters) == (expected, sum(v.size for v in before.values()))
    assert done.training.val_loss < metrics(here / "adapters")[0]["val_loss"]


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 20.0), ({"scale": 3.0}, 3.0), ({"alpha": 6.0}, 1.5), ({"alpha": 6.0, "use_rslora": True}, 3.0)],
)
def test_the_scale_of_an_adapter(here, options, scale):
    tune(replace(SHORT, iters=1, warmup=0, val_batches=0, **options))
    config = json.loads((here / "adapters" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == pytest.approx(scale)
    assert config["lora_parameters"]["rank"] == 4 and config["fine_tune_type"] == "lora"


@pytest.mark.slow
def test_mlx_lm_loads_the_adapter(here):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    for kind in ("lora", "dora"):
        tune(replace(SHORT, fine_tune_type=kind, adapter_path=kind))
        ours, tokenizer = load("model", adapter_path=kind)
        theirs = load_adapters(load_model(here / "model")[0], kind)
        theirs.eval()
        tokens = mx.array([tokenizer.encode("the king went to see")])
        base, _ = load("model")
        assert mx.allclose(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4).item()
        assert mx.max(mx.abs(ours(tokens) - base(tokens))).item() > 0.1
    # A checkpoint is also an adapter.
    checkpoint, _ = load("model", adapter_path="dora/checkpoints/0000009")
    assert mx.array_equal(checkpoint(tokens), ours(tokens)).item()


def test_the_test_loss_equals_the_loss_of_the_adapter(here):
    """The reported perplexity, against one computed from logits in NumPy."""
    done = tune(replace(SHORT, test=True, test_batches=-1, val_batches=0, save_every=9))
    again = tune(replace(SHORT, train=False, test=True, test_batches=-1))
    base = tune(replace(SHORT, train=False, test=True, test_batches=-1, adapter_path=""))
    model, tokenizer = load("model", adapter_path="adapters")
    total, count = 0.0, 0
    for line in (here / "data" / "test.jsonl").read_text().splitlines():
        tokens = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id][:49]
        logits = np.array(model(mx.array([tokens[:-1]])))[0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= logprobs[np.arange(len(tokens) - 1), tokens[1:]].sum()
        count += len(tokens) - 1
    assert done.test.tokens == again.test.tokens == count
    assert done.test.loss == pytest.approx(total / count, rel=1e-5)
    assert again.test.loss == pytest.approx(total / count, rel=1e-5)
    assert base.test.loss > done.test.loss + 0.5 and base.adapter_path is None and base.trained_parameters == 0
    assert again.training is None and again.adapter_path == "adapters"


# Of the two texts in `few` a run soon learns more than helps with others.
EARLY = replace(SHORT, data="few", iters=200, learning_rate=0.3, lr_schedule="constant", warmup=0, early_stop=2,
                steps_per_eval=2, max_grad_norm=None, save_every=200)  # fmt: skip


def test_early_stopping_keeps_the_best(here):
    options = replace(EARLY, test=True)
    write_data(here / "few", train=2)
    notes = Notes()
    done = tune(options, notes)
    result = done.training
    losses = {row["step"]: row["val_loss"] for row in metrics(here / "adapters") if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert result.stopped == "stopped early" and result.steps == best + 4 == max(losses) and result.best_step == best
    assert result.val_step == result.steps and result.val_loss == losses[result.steps]
    assert done.adapter_step == best > 0 and done.best_checkpoint is None
    left = (here / "adapters" / "adapters.safetensors").read_bytes()
    assert left == (here / "adapters" / "checkpoints" / "best" / "adapters.safetensors").read_bytes()
    assert left != (here / "adapters" / "checkpoints" / f"{result.steps:07d}" / "adapters.safetensors").read_bytes()
    # Without early stopping the last weights are kept, and the best are in their checkpoint.
    more = tune(replace(options, resume=True, early_stop=None, iters=result.steps + 1))
    assert more.training.best_step == best and more.adapter_step == result.steps + 1
    assert more.best_checkpoint == f"adapters/checkpoints/{best:07d}"
    assert (here / more.best_checkpoint / "adapters.safetensors").read_bytes() == left


def test_a_run_can_start_from_an_adapter(here):
    first = tune(replace(BRIEF, dropout=0.0, adapter_path="first"))
    options = replace(BRIEF, adapter_path="second", resume_adapter_file="first/adapters.safetensors", dropout=0.0)
    tune(options)
    assert metrics(here / "second")[0]["val_loss"] == pytest.approx(first.training.val_loss, rel=1e-6)
    for changes, named in (
        ({"rank": 8}, "has rank 4 .*rank 4"),
        ({"scale": 10.0}, "has scale 20 .*scale 20"),
        ({"fine_tune_type": "dora"}, "fine_tune_type lora"),
        ({"num_layers": 1}, "2 layers; give"),
        ({"fine_tune_type": "full"}, "fuse it into the model first"),
    ):
        with pytest.raises(RequestError, match=named):
            tune(replace(options, adapter_path="third", **changes))
    full = replace(BRIEF, dropout=0.0, fine_tune_type="full", learning_rate=1e-3, adapter_path="full")
    first = tune(full)
    tune(replace(full, adapter_path="full2", resume_adapter_file="full/adapters.safetensors"))
    assert metrics(here / "full2")[0]["val_loss"] == pytest.approx(first.training.val_loss, rel=1e-6)


def test_a_run_started_from_an_adapter_resumes_from_it_even_if_stopped_at_once(here):
    tune(replace(BRIEF, adapter_path="first"))
    options = replace(BRIEF, resume_adapter_file="first/adapters.safetensors")
    tune(replace(options, adapter_path="whole"))
    _stop_after(1, replace(options, adapter_path="parts"), Notes())
    shutil.rmtree(here / "first")
    tune(replace(BRIEF, adapter_path="parts", resume=True))
    assert trained(here / "parts") == trained(here / "whole") and metrics(here / "parts") == metrics(here / "whole")


def test_a_run_cannot_start_from_an_adapter_of_the_output_layer(here):
    options = replace(SHORT, target_modules=("token_embeddings",), iters=1, warmup=0)
    tune(replace(options, adapter_path="first"))
    settings = json.loads((here / "first" / "adapter_config.json").read_text())
    assert settings.pop("embedding_output_side") is False
    tune(replace(options, adapter_path="second", resume_adapter_file="first"))
    (here / "first" / "adapter_config.json").write_text(json.dumps(settings))  # as written by mlx-lm
    with pytest.raises(RequestError, match="first changes the output layer .*token_embeddings"):
        tune(replace(options, adapter_path="third", resume_adapter_file="first"))


def test_with_a_damaged_best_checkpoint_the_last_weights_are_kept(here, monkeypatch):
    write_data(here / "few", train=2)
    monkeypatch.setattr(Checkpoints, "tensors", lambda self, step: _raise(f"The checkpoint {step} is damaged: so."))
    notes = Notes()
    result = tune(EARLY, notes).training
    assert result.best_step > 0
    assert f"The checkpoint {result.best_step} is damaged: so. The last weights are kept" in "".join(notes.lines)
    last = here / "adapters" / "checkpoints" / f"{result.steps:07d}" / "adapters.safetensors"
    assert (here / "adapters" / "adapters.safetensors").read_bytes() == last.read_bytes()


def _raise(message: str) -> None:
    raise OpenELMError(message)


def test_overwriting_removes_tensorboards_event_files(here):
    pytest.importorskip("tensorboardX")
    options = replace(SHORT, iters=1, warmup=0, report_to="tensorboard")
    tune(options)
    (events,) = (here / "adapters" / "tensorboard").iterdir()
    events = events.rename(events.with_name("events.out.tfevents.1.there"))
    (here / "adapters" / "tensorboard" / "notes.txt").write_text("mine")
    tune(replace(options, seed=1), overwrite=True)
    assert not events.exists()
    assert len(list((here / "adapters" / "tensorboard").iterdir())) == 2


def test_options_reach_the_parts_they_configure(here, monkeypatch):
    seen = {}
    homes = {"Updater": finetune_module, "Checkpoints": finetune_module, "CrossEntropy": method_module,
             "batches_type": method_module.Method}  # fmt: skip
    for name, home in homes.items():
        make = getattr(home, name)
        note = lambda *args, _make=make, **options: seen.update(options) or _make(*args, **options)  # noqa: E731
        monkeypatch.setattr(home, name, staticmethod(note))
    values = {"grad_checkpoint": True, "max_grad_norm": 0.5, "z_loss": 0.1, "label_smoothing": 0.2, "seed": 5,
              "packing": True, "batch_size": 2, "grad_accumulation_steps": 3, "keep_last": 4,
              "keep_every": 6}  # fmt: skip
    done = tune(replace(SHORT, iters=3, dropout=0.0, fine_tune_type="full", test=True, **values),
                loading=Loading(dtype="bfloat16"))  # fmt: skip
    assert json.loads(Path("adapters/run.json").read_text())["recompute"] == "layers" and values.pop("grad_checkpoint")
    assert {name: seen[name] for name in values} == values
    # Computed in 16 bits, stored in 32 bits.
    assert seen["compute_dtype"] == mx.bfloat16 and math.isfinite(done.test.loss)
    assert {value.dtype for value in mx.load("adapters/adapters.safetensors").values()} == {mx.float32}


def test_epochs_are_converted_to_steps(here):
    options = replace(SHORT, max_seq_length=16, val_batches=0, save_every=9)
    assert tune(replace(options, epochs=1.5)).training.total_steps == 9  # 23 examples are 6 batches
    tune(replace(options, epochs=1.0, grad_accumulation_steps=2, adapter_path="b"))
    assert metrics(here / "b")[-1]["step"] == 3


def test_lines_printed_before_training(here):
    notes = Notes()
    done = tune(replace(BRIEF, max_seq_length=5000, sample_prompts=("the king",), sample_tokens=4), notes)
    text = "\n".join(notes.lines)
    assert "max_seq_length is" in text and "train: 23 examples (text)" in text and "<s>⟦" in text
    trainable = sum(v.size for v in mx.load("adapters/adapters.safetensors").values())
    assert f"({trainable / 1e6:.3f}M/" in text and done.trained_parameters == trainable
    sample = done.samples[0]
    assert sample.prompt == "the king" and sample.before and sample.before != sample.after


def test_a_loss_that_is_not_finite_names_the_lines(here):
    with pytest.raises(OpenELMError) as caught:
        tune(replace(SHORT, learning_rate=1e30, warmup=0, max_grad_norm=None, optimizer="sgd", iters=50))
    message = str(caught.value)
    assert "at step" in message and "train.jsonl, line " in message and "resume" in message
    steps = [int(path.name) for path in (here / "adapters" / "checkpoints").glob("0*")]
    saved = [mx.load(str(here / "adapters" / "checkpoints" / f"{step:07d}" / "weights.safetensors")) for step in steps]
    assert all(mx.all(mx.isfinite(value)).item() for tensors in saved for value in tensors.values())
    assert all(math.isfinite(row["train_loss"]) for row in metrics(here / "adapters") if "train_loss" in row)
