"""Pretraining as a whole: the models it starts from and writes, exact resume, same bytes, refusals."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx_openelm
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.hub import catalog
from mlx_openelm.loading import load
from mlx_openelm.training import pretrain as pretrain_module
from mlx_openelm.training.data.corpus import packed
from mlx_openelm.training.finetune import finetune
from mlx_openelm.training.options import FineTuneOptions
from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.pretrain import Pretrained, pretrain
from mlx_openelm.training.run import metrics as metrics_module
from mlx_openelm.training.run import starting
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import Metrics
from mlx_openelm.training.run.preparing import Loading
from mlx_openelm.training.step.initial_weights import initial_weights
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import numpy as np
import pytest
from in_process import run_here
from mlx.utils import tree_flatten
from pretraining_runs import SIZES, START, WINDOW, command, kill_after, options, run, write_folder
from quantization_models import write_tiny
from test_distributed import LAUNCH, launch
from training_runs import PROGRAM, ROOT, Notes, environment, metrics, trained

LOADING = Loading(tokenizer="tokenizer")
# The programs whose files are compared with those of this process compute on the CPU, as it does.
ON_CPU = ("-c", f"import mlx_openelm; import mlx.core as mx; mx.set_default_device(mx.cpu); {START}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A fresh folder to train in, with tokenizer, data and configuration."""
    for name in ("tokenizer", "data", "run.yaml"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    # Plots take a second each, and measuring the peak too.
    monkeypatch.setattr(pretrain_module, "Metrics", partial(Metrics, plot=False))
    monkeypatch.setattr(pretrain_module, "measured_peak", lambda dtype: 1e12)
    monkeypatch.setattr(packed, "WINDOW", WINDOW)
    return tmp_path


def train(model=SIZES, *, loading: Loading = LOADING, listener: Listener | None = None, overwrite=False, **changes):
    return pretrain(model, options(**changes), loading=loading, listener=listener or Listener(), overwrite=overwrite)


def stop_after(steps: int, **changes) -> None:
    """Begin or continue a run that fails after so many steps."""
    update = Updater.update

    def stop(self, batches, num_targets, learning_rate, step, *rest):
        if step == steps:
            raise OpenELMError("stopped")
        return update(self, batches, num_targets, learning_rate, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", stop)
        with pytest.raises(OpenELMError, match="stopped"):
            train(**changes)


# The whole.


def test_a_run_learns_and_its_model_loads(here):
    done = train(iters=24, learning_rate=3e-2, steps_per_eval=12, save_every=24)
    assert isinstance(done, Pretrained) and done.models == {"model": "pretrained/model"}
    model, tokenizer = load("pretrained/model")
    assert model.config.ffn_dims == ModelConfig(vocab_size=2048, num_gqa_groups=4, **SIZES).ffn_dims
    assert model.config.share_input_output_layers and model.config.normalize_qk_projections
    rows = metrics(here / "pretrained")
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[0] == pytest.approx(math.log(2048), abs=0.6) and losses[-1] < 4 and len(losses) == 3
    # The loss of the written model on the text, computed by hand: windows, each after BOS, without EOS.
    documents = [json.loads(line)["text"] for line in (here / "data" / "valid.jsonl").read_text().splitlines()]
    total, count = 0.0, 0
    for text in documents:
        ids = tokenizer.encode(text, add_bos=False)
        for start in range(0, len(ids), 48):
            window = ids[start : start + 48]
            logits = model(mx.array([[tokenizer.bos_token_id, *window[:-1]]]))[0]
            chosen = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), mx.array(window)[:, None], -1)
            total, count = total - mx.sum(chosen).item(), count + len(window)
    assert losses[-1] == pytest.approx(total / count, rel=1e-5)
    last = next(row for row in reversed(rows) if "val_loss" in row)
    characters, size = (sum(len(f(text)) for text in documents) for f in (str, str.encode))
    assert last["val_loss_per_character"] == pytest.approx(total / characters, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)


def test_the_command_runs_a_file_and_its_folder_has_what_it_says(here, monkeypatch):
    drawn = {}
    monkeypatch.setattr(metrics_module, "draw", lambda curves, path, title: drawn.update(curves) or path.touch())
    monkeypatch.setattr(pretrain_module, "Metrics", Metrics)  # which plots
    done = run_here("pretrain", "--config", "run.yaml", "--output", "out", "--json", folder=here)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["steps"] == 9 and values["models"] == {"model": "out/model"} and values["validation"]["model"] > 0
    names = {path.name for path in (here / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"model", "checkpoints", "metrics.jsonl", "run.json", "losses.png"}
    assert [len(drawn[curve]) for curve in ("train_loss", "val_loss")] == [5, 4] and drawn["learning_rate"]
    record = json.loads((here / "out" / "run.json").read_text())
    assert record["data"]["mode"] == "packed" and record["data"]["positions"] >= 9 * 2 * 48
    assert "The model is new: own sizes" in done.stderr and "train: 1 file, " in done.stderr
    assert "bits per byte" in done.stderr and "of the peak" in done.stderr
    again = run_here("pretrain", "--config", "run.yaml", "--output", "out", folder=here)
    assert again.returncode == 2 and "continue it with --resume, replace it with --overwrite" in again.stderr
    assert "choose another --output" in again.stderr


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(here):
    extra = ("--ema-decay", 0.9, "--average-last", 2, "--skip-spikes", 6, "--embedding-learning-rate", 1e-3)
    for name, workers in (("one", 0), ("two", 2)):
        done = run("--config", "run.yaml", "--output", name, "--num-workers", workers, *extra, folder=here)
        assert done.returncode == 0, done.stderr
    one, two = trained(here / "one"), trained(here / "two")
    assert one == two and "model-average/model.safetensors" in one and "model-ema/config.json" in one
    assert metrics(here / "one") == metrics(here / "two")


def test_in_python_it_is_beside_finetune():
    assert mlx_openelm.pretrain is pretrain or mlx_openelm.pretrain.__wrapped__ is pretrain
    assert mlx_openelm.PretrainOptions is PretrainOptions and mlx_openelm.Pretrained is Pretrained


# What it starts from.


def test_initial_weights_are_those_of_corenet():
    config = ModelConfig.from_dict(SIZES | {"vocab_size": 2048, "model_dim": 256, "num_gqa_groups": 4,
                                            "num_transformer_layers": 4, "share_input_output_layers": False,
                                            "normalize_qk_projections": True})  # fmt: skip
    weights = initial_weights(config, seed=3)
    assert {name: value.shape for name, value in weights.items()} == config.tensor_shapes()
    for name, value in weights.items():
        array = np.array(value)
        if array.ndim == 1:
            assert (array == 1).all()
            continue
        out_of = {"out_proj": (256 * 8) ** -0.5, "proj_2": (256 * 8) ** -0.5, "token_embeddings": 256**-0.5}
        expected = out_of.get(name.split(".")[-2], array.shape[1] ** -0.5)
        assert array.std() == pytest.approx(expected, rel=0.03), name
        assert abs(array.mean()) < 4 * expected / array.size**0.5
        # Normal, not uniform: 4.6% lie beyond two deviations.
        assert np.mean(np.abs(array) > 2 * expected) == pytest.approx(0.0455, abs=0.01)
    again, other = initial_weights(config, seed=3), initial_weights(config, seed=4)
    assert all(mx.array_equal(again[name], weights[name]).item() for name in weights)
    assert not mx.array_equal(other["lm_head.weight"], weights["lm_head.weight"]).item()


def test_a_size_by_name_gives_its_shape(here, monkeypatch):
    made = []
    monkeypatch.setattr("mlx_openelm.training.run.starting._new", lambda config, *rest: made.append(config))
    from mlx_openelm.training.run.starting import start

    start("270m", LOADING, seed=0, max_seq_length=48)
    start({"name": "OpenELM-1_1B", "vocab_size": 32128}, LOADING, seed=0, max_seq_length=48)
    assert made[0] == ModelConfig.from_name("270m").__class__(**_fields("270m") | {"vocab_size": 2048})
    assert made[1] == ModelConfig(**_fields("1.1b") | {"vocab_size": 32128})


def _fields(name: str) -> dict:
    values = ModelConfig.from_name(name).to_dict()
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
            if key not in ("model_type", "architectures", "use_cache")}  # fmt: skip


def test_it_continues_from_a_folder(here):
    write_tiny(here / "model")
    notes = Notes()
    train("model", loading=Loading(), iters=1, learning_rate=1e-30, warmup=0, listener=notes)
    assert "The model continues from the weights of model." in notes.lines
    old, new = (dict(tree_flatten(load(name)[0].parameters())) for name in ("model", "pretrained/model"))
    assert all(mx.array_equal(old[name], new[name]).item() for name in old)


def test_cards_say_what_training_began_from(here):
    train(iters=1, warmup=0)
    train("pretrained/model", loading=Loading(), iters=1, warmup=0, output="more")
    mlx_openelm.average(["pretrained/model", "more/model"], "mean", progress=False)
    begun = "own sizes, trained from random weights"
    expected = {
        "pretrained/model": begun,
        "more/model": f"{begun}, continued from pretrained",
        "mean": f"the mean of {begun}, {begun}, continued from pretrained",
    }
    for folder, what in expected.items():
        card = (here / folder / "README.md").read_text()
        assert f"This is an OpenELM model ({what}), for MLX" in card
        assert "its makers choose the license" in card and "original" not in card


def test_a_local_model_that_is_continued_is_named(here):
    write_tiny(here / "model")
    origins = [starting.start(name, Loading(), seed=0, max_seq_length=48).origin for name in ("model", "tiny")]
    assert [(origin.name, origin.from_scratch) for origin in origins] == [
        ("continued from model", False),
        ("tiny, trained from random weights", True),  # not the model of that name, which has a license and a text
    ]


def test_rows_of_the_vocabulary_that_no_token_uses_are_dropped_at_the_end(here):
    train(SIZES | {"vocab_size": 2176}, iters=1, warmup=0)
    state = mx.load(str(here / "pretrained" / "checkpoints" / "0000001" / "weights.safetensors"))
    assert state["weights.transformer.token_embeddings.weight"].shape == (2176, 64)
    model, tokenizer = load("pretrained/model")
    assert model.config.vocab_size == tokenizer.vocab_size == 2048


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (SIZES | {"model_dims": 3}, {}, "unknown field 'model_dims'; did you mean model_dim?"),
        (SIZES | {"name": "7b"}, {}, "^The model's name must be one of 270m, 450m, 1.1b, 3b, tiny, .*, got '7b'"),
        (SIZES | {"name": 7}, {}, "^The model's name must be one of .*, got 7"),
        (SIZES | {"vocab_size": 9}, {}, "tokenizer has 2048 tokens, but the model only 9"),
        ({"model_dim": 64}, {}, "has no num_transformer_layers"),
        (SIZES, {"data": ()}, "data is needed"),
        (SIZES, {"data": ("absent",)}, "absent"),
        (SIZES, {"epochs": 2.0}, "epochs is for fine-tuning"),
        (SIZES, {"packing": True}, "packing is for fine-tuning"),
        (SIZES, {"batch_tokens": 100}, "batch_tokens 100 is not batch_size 2 x max_seq_length 48 x .* = 96"),
        (SIZES, {"ema_decay": 1.0}, "ema_decay must be less than 1"),
        (SIZES, {"mode": "rows"}, "mode must be packed or corenet"),
        (SIZES, {"output": " "}, "output must name a folder"),
        (SIZES, {"mode": "corenet", "label_smoothing": 0.1}, "label_smoothing is for mode packed"),
        ("nowhere/at/all", {}, "nowhere/at/all"),
        (["270m"], {}, r"model must be a name, a path, or sizes by their names, got \['270m'\]"),
    ],
)
def test_requests_that_cannot_work_are_refused_before_anything_is_written(here, model, changes, message):
    with pytest.raises(RequestError, match=message):
        train(model, **changes)
    assert not (here / "pretrained" / "run.json").exists()


def test_a_run_before_stays_if_the_new_one_has_no_text(here):
    train(iters=1, warmup=0)
    before = {path: path.read_bytes() for path in (here / "pretrained").rglob("*") if path.is_file()}
    for name, text in (("empty.jsonl", ""), ("blank.jsonl", '{"text": ""}\n'), ("bad.jsonl", "{\n")):
        (here / name).write_text(text)
        for output, overwrite in (("new", False), ("pretrained", True)):
            with pytest.raises(RequestError, match=name):
                train(data=(name,), output=output, overwrite=overwrite)
        assert not (here / "new" / "run.json").exists()
        assert {path: path.read_bytes() for path in (here / "pretrained").rglob("*") if path.is_file()} == before


def test_missing_text_is_refused_before_the_model_is_made(here, monkeypatch):
    monkeypatch.setattr(pretrain_module, "start", lambda *args, **options: pytest.fail("The model was made."))
    for changes in ({"data": ("absent.txt",)}, {"valid": ("absent.txt",)}):
        with pytest.raises(RequestError, match="no folder or file absent.txt"):
            train(**changes)


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_a_packaged_model_with_other_layers(name):
    made = starting.start({"name": name, "num_transformer_layers": 3}, Loading(), seed=0, max_seq_length=32)
    whole = ModelConfig.from_file(catalog.PACKAGED[name])
    config = made.model.config
    changed = {"num_transformer_layers", "num_query_heads", "num_kv_heads", "ffn_multipliers", "qkv_multipliers"}
    ours, theirs = config.to_dict(), whole.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= changed and config.num_transformer_layers == 3
    assert config.ffn_multipliers == (0.5, 2.25, 4.0) and made.name == name
    assert starting.start({"name": name}, Loading(), seed=0, max_seq_length=32).model.config == whole


def test_a_file_with_a_wrong_name_of_a_model_names_that_key(here):
    (here / "wrong.yaml").write_text("model: {name: tiny-drafts}\ntokenizer: tiny-drafts\ndata: data\n")
    done = run_here("pretrain", "--config", "wrong.yaml", folder=here)
    assert done.returncode == 2 and done.stderr.endswith("got 'tiny-drafts'. model.name is set in wrong.yaml.\n")


def test_a_model_of_own_sizes_needs_a_tokenizer(here):
    with pytest.raises(RequestError, match="tokenizer is needed for a model of your own sizes"):
        train(loading=Loading())
    done = run_here("pretrain", "--data", "data", folder=here)
    assert done.returncode == 2 and "--model is needed" in done.stderr


def test_batch_tokens_set_the_accumulation():
    made = options(batch_tokens=2 * 48 * 5)
    assert made.grad_accumulation_steps == 5
    made.check()
    options(batch_tokens=2 * 48 * 5, grad_accumulation_steps=5).check()
    with pytest.raises(RequestError, match="480 is not .* 2 x .* 48 x .* 4 = 384"):
        options(batch_tokens=480, grad_accumulation_steps=4).check()


# Exact resume.


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"mode": "corenet", "min_tokens": 8, "min_characters": 8, "ftfy": False},
    ],
)
def test_a_run_stopped_at_any_step_equals_an_uninterrupted_one(here, extra):
    extra |= {"ema_decay": 0.9, "average_last": 2, "skip_spikes": 3.0, "spike_window": 4, "grad_accumulation_steps": 2}
    extra |= {"iters": 6}
    train(output="whole", **extra)
    for end in (1, 2, 5):
        stop_after(end, output="parts", resume=end > 1, **extra)
    done = train(output="parts", resume=True, num_workers=1, **{k: v for k, v in extra.items()})
    assert done.training.stopped == "finished"
    assert trained(here / "parts") == trained(here / "whole") and metrics(here / "parts") == metrics(here / "whole")


def kill_and_resume(folder: Path, flags: tuple, kills: int, seed: int) -> None:
    """Kill a run at random times and resume it; it must leave the same files as an uninterrupted run."""
    whole = run_here("pretrain", *flags, "--output", "whole", folder=folder)
    assert whole.returncode == 0, whole.stderr
    draw = random.Random(seed)
    for attempt in range(kills):
        words = flags if attempt == 0 else ("--resume", "--num-workers", draw.choice([0, 1, 2]))
        output = kill_after(draw.randint(1, 4), draw.random() * 0.1, *words, "--output", "parts", folder=folder,
                            start=ON_CPU)  # fmt: skip
        assert "error" not in output and "damaged" not in output, output
    last = run_here("pretrain", "--resume", "--output", "parts", "--json", folder=folder)
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["stopped"] == "finished"
    assert trained(folder / "parts") == trained(folder / "whole")
    assert metrics(folder / "parts") == metrics(folder / "whole")


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(here):
    flags = ("--mode", "corenet", "--min-tokens", 8, "--min-characters", 8, "--iters", 10, "--save-every", 1)
    # The file's buffer is for the other mode.
    kill_and_resume(here, ("--config", "run.yaml", "--shuffle-buffer", 2048, *flags), 1, seed=1)


@pytest.mark.slow
def test_a_run_killed_thirty_times_equals_an_uninterrupted_one(here):
    flags = ("--config", "run.yaml", "--iters", 90, "--save-every", 1, "--ema-decay", 0.9, "--average-last", 3)
    kill_and_resume(here, flags, 30, seed=2)


def test_another_run_cannot_be_resumed(here):
    stop_after(3)
    for changes, named in (({"batch_size": 4}, "batch_size 2, not 4"), ({"seed": 1}, "seed 0, not 1"),
                           ({"mode": "corenet"}, "mode packed, not corenet"),
                           ({"ema_decay": 0.5}, "ema_decay unset, not 0.5")):  # fmt: skip
        with pytest.raises(RequestError, match=f"{named} .* start a new run in another output"):
            train(resume=True, **changes)
    with pytest.raises(RequestError, match="to resume has model"):
        train(SIZES | {"model_dim": 128}, resume=True)
    (here / "other").mkdir()
    (here / "other" / "train.jsonl").write_text(json.dumps({"text": "Other words, and more of them."}) + "\n")
    with pytest.raises(RequestError, match="data is not that of the run to continue"):
        train(resume=True, data=("other",))


def test_a_run_of_another_command_is_named(here):
    train(iters=1, warmup=0)
    record = json.loads((here / "pretrained" / "run.json").read_text())
    assert record["kind"] == "pretrain"
    with pytest.raises(RequestError, match="one of `mlx-openelm pretrain`; continue it with that command"):
        finetune(
            "tiny", FineTuneOptions(train=True, resume=True, adapter_path="pretrained", data="data"), progress=False
        )
    (here / "pretrained" / "run.json").write_text(json.dumps(record | {"kind": "lora"}))
    with pytest.raises(RequestError, match="one of `mlx-openelm lora`; continue it with that command"):
        train(resume=True, iters=1, warmup=0)


def test_a_complete_run_says_so_and_a_longer_one_goes_on(here):
    train(iters=3)
    notes = Notes()
    train(resume=True, iters=3, listener=notes)
    assert "The run is complete, after 3 steps; raise iters to go on." in notes.lines
    assert train(resume=True, iters=5).training.steps == 5


def test_overwriting_removes_the_models_of_the_run_before(here):
    train(iters=1, warmup=0, ema_decay=0.5)
    (here / "pretrained" / "notes.txt").write_text("mine")
    assert (here / "pretrained" / "model-ema").is_dir()
    train(iters=1, warmup=0, overwrite=True)
    names = {path.name for path in (here / "pretrained").iterdir()}
    assert "model-ema" not in names and {"model", "notes.txt"} <= names


# Averages.


def test_the_averages_are_those_of_the_weights(here):
    train(iters=8, ema_decay=0.8, average_last=3, keep_last=8, save_every=1, warmup=0, steps_per_eval=8)
    steps = [mx.load(str(here / f"pretrained/checkpoints/{n:07d}/weights.safetensors")) for n in range(1, 9)]
    name = "transformer.layers.1.ffn.proj_1.weight"
    values = [np.array(step[f"weights.{name}"], dtype=np.float64) for step in steps]
    found = {kind: np.array(dict(tree_flatten(load(f"pretrained/model{kind}")[0].parameters()))[name])
             for kind in ("", "-ema", "-average")}  # fmt: skip
    np.testing.assert_array_equal(found[""], values[-1])
    np.testing.assert_allclose(found["-average"], np.mean(values[-3:], axis=0), rtol=1e-6, atol=1e-7)
    config = load("pretrained/model")[0].config
    average = np.array(initial_weights(config, 0)[name], dtype=np.float64)
    for number, value in enumerate(values, start=1):
        kept = min(0.8, (1 + number) / (10 + number))
        average = kept * average + (1 - kept) * value
    np.testing.assert_allclose(found["-ema"], average, rtol=1e-5, atol=1e-7)


def test_early_stopping_keeps_the_best_weights(here):
    done = train(iters=40, learning_rate=1.0, warmup=0, lr_schedule="constant", steps_per_eval=1, early_stop=2,
                 save_every=50)  # fmt: skip
    result = done.training
    assert result.stopped == "stopped early" and result.steps < 40
    if result.best_step:
        assert done.model_step == result.best_step


# The command's other ways.


def test_ctrl_c_saves_and_says_how_to_continue(here):
    start = ("--config", "run.yaml", "--iters", 2000, "--save-every", 1000, "--steps-per-report", 1, "--val-batches", 0,
             "--output", "out")  # fmt: skip
    process = subprocess.Popen(command(*start), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment(), cwd=here, preexec_fn=default_interrupt)  # fmt: skip
    assert process.stderr is not None
    while line := process.stderr.readline():
        if line.startswith("Step 2 of"):
            process.send_signal(signal.SIGINT)
            break
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped after step" in out and "  mlx-openelm pretrain --resume --output out\n" in out
    assert (here / "out" / "model" / "config.json").is_file()


def default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_unknown_recipe_is_named(here):
    done = run_here("pretrain", "--config", "openelm-270", "--data", "data", folder=here)
    assert done.returncode == 2 and "is no file, and no recipe; did you mean openelm-270m" in done.stderr


@pytest.mark.slow
def test_the_guide_runs(here):
    """Its configuration with fewer steps, and its Python as it stands."""
    guide = (ROOT / "docs" / "pretraining.md").read_text()
    (here / "my_tokenizer").symlink_to(here / "tokenizer")
    (here / "my_text").symlink_to(here / "data")
    (here / "my_valid.jsonl").symlink_to(here / "data" / "valid.jsonl")
    (here / "my_run.yaml").write_text(re.findall(r"```yaml\n(.*?)```", guide, re.S)[0])
    done = run("--config", "my_run.yaml", "--iters", 2, "--warmup", 1, "--batch-size", 2, folder=here)
    assert done.returncode == 0, done.stderr
    (here / "script.py").write_text(re.findall(r"```python\n(.*?)```", guide, re.S)[0])
    shown = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, env=environment(), cwd=here)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("my_run/model ")


def test_it_says_what_was_left_out(here):
    (here / "some").mkdir()
    text = (here / "data" / "train.jsonl").read_text()
    (here / "some" / "train.jsonl").write_text('{"text": 3\n' + text)
    notes = Notes()
    done = train(data=("some",), iters=2, warmup=1, skip_damaged=True, listener=notes)
    read = done.data["documents"]
    assert (read["damaged documents"], read["documents"]) == (1, 40)
    assert "Left out of the text: damaged documents 1." in notes.lines
    notes = Notes()
    train(data=("some",), iters=8, batch_size=4, mode="corenet", ftfy=False, min_tokens=50, skip_damaged=True,
          min_characters=8, output="other", listener=notes)  # fmt: skip
    assert any(
        re.search(r"^Left out .*pieces with too few tokens \d+.*tokens cut off \d+", line) for line in notes.lines
    )


# Several processes.


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_two_processes_train_like_one_and_one_continues_what_they_began(here):
    """SGD: Adam would amplify rounding errors of the smallest gradients. Step 6 reports and validates in either run."""
    start = ("--config", "run.yaml", "--optimizer", "sgd", "--learning-rate", 1e-2, "--batch-size", 4)
    words = (*start, "--decay-steps", 8, "--iters", 6, "--output", "two")
    both = launch(*command(*words, python=(), start=PROGRAM), folder=here)
    output = both.communicate(timeout=600)[0]
    assert both.returncode == 0 and output.count("Step 0: validation loss") == 1, output
    alone = {"optimizer": "sgd", "learning_rate": 1e-2, "batch_size": 4, "decay_steps": 8, "iters": 8}
    train(output="one", **alone)
    train(output="two", resume=True, **alone)
    one, two = metrics(here / "one"), metrics(here / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) > 6
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
        for name in ("train_loss", "val_loss"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=2e-5)
