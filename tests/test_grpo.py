"""GRPO as a whole: runs, exact resume, rewards, several machines, the command and its files."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from mlx_openelm import GRPOOptions, convert, grpo, load
from mlx_openelm.cli.main import command as cli_command
from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.training import finetune as finetune_module
from mlx_openelm.training.data.kinds import Record
from mlx_openelm.training.data.prompts import Prompt, tokenize_prompts
from mlx_openelm.training.options import FineTuneOptions
from mlx_openelm.training.run import metrics as metrics_module
from mlx_openelm.training.run import rollouts as rollouts_module
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import Metrics, figure, read
from mlx_openelm.training.run.rewards import Completion, make_rewards

import mlx.core as mx
import pytest
from in_process import run_here
from quantization_models import write_tiny
from test_distributed import LAUNCH, launch
from training_runs import WORDS, Notes, command, kill_after, metrics, trained

REWARDS = """
import sys

def early(completion_ids, **others):
    assert {"prompts", "completions", "goal"} <= others.keys()
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]

def short(completion_ids, goal):
    return [None if number is None else -abs(len(ids) - number) / 8 for ids, number in zip(completion_ids, goal)]

def fails(completions):
    return [1 / 0 for _ in completions]

def leaves(completions):
    sys.exit()

def too_few(completions):
    return [1.0]

async def later(completions):
    return []

class Called:
    async def __call__(self, completions):
        return []

called_later = Called()

def never(completions):
    return [None] * len(completions)

not_a_function = 3
"""
FUNCTIONS = ("rewards.py:early", "rewards.py:short")
SHORT = GRPOOptions(train=True, data="data", iters=4, batch_size=4, num_generations=4, max_completion_length=6,
                    max_seq_length=48, learning_rate=1e-2, steps_per_report=1, steps_per_eval=2, val_batches=2,
                    save_every=1, rank=4, reward_funcs=FUNCTIONS)  # fmt: skip


def write_prompts(folder: Path, train: int = 7, valid: int = 3, test: int = 3) -> Path:
    folder.mkdir()
    for name, number in (("train", train), ("valid", valid), ("test", test)):
        rows = [
            {"prompt": " ".join(WORDS[k : k + 1 + k % 4]), "goal": None if k == 1 else k % 5 + 1} for k in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    write_tiny(folder / "model")
    write_prompts(folder / "data")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A fresh folder to train in, with the model, the data and the rewards."""
    for name in ("model", "data", "rewards.py"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_module, "Metrics", partial(Metrics, plot=False))
    return tmp_path


def tune(options: GRPOOptions = SHORT, listener: Listener | None = None, model: str = "model", **rest: Any) -> Any:
    return grpo(model, options, listener=listener or Notes(), **rest)


def rows_of(here: Path) -> list[dict[str, Any]]:
    return read(here / "adapters" / "metrics.jsonl")


# Whole runs.


def test_a_run_learns_from_rewards_and_writes_its_files(here):
    notes = Notes()
    options = replace(SHORT, iters=8, steps_per_eval=8, batch_size=8, num_generations=8, learning_rate=2e-2,
                      save_every=8, test=True, reward_weights=(1.0, 0.0), sample_prompts=("the king",),
                      sample_tokens=4)  # fmt: skip
    done = tune(options, notes)
    assert done.counts == "completions" and done.training.trained_tokens == 8 * 8
    rows = rows_of(here)
    first, last = (row for row in rows if "val_loss" in row)
    assert last["val_reward"] > first["val_reward"] + 0.1
    assert last["val_loss"] == -last["val_reward"] and done.test.metrics["reward"] > first["val_reward"]
    assert done.test.tokens == 3 * 8
    reports = [row for row in rows if "train_loss" in row]
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/early/mean", "rewards/short/std", "entropy",
             "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "trained_completions",
             "completions_per_second"}  # fmt: skip
    assert names <= reports[0].keys() and "kl" not in reports[0] and "trained_tokens" not in reports[0]
    assert {"val_rewards/early/mean", "val_completions/mean_length"} <= first.keys()
    # The only prompt without a goal: the reward does not apply to it.
    alone = [row for row in reports if "rewards/short/mean" not in row]
    assert 0 < len(alone) < len(reports)
    record = json.loads((here / "adapters" / "run.json").read_text())
    assert record["kind"] == "grpo" and record["options"]["reward_funcs"] == list(FUNCTIONS)
    text = "\n".join(notes.lines)
    assert "A prompt:\n<s>" in text
    assert "with their rewards (early, short):" in text and text.count("⟦") == 9
    assert ", generation up to " in text and "the reference model" not in text
    assert [sample.prompt for sample in done.samples] == ["the king"]
    load("model", adapter_path="adapters")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "grad_accumulation_steps": 2},
        {"loss_type": "bnpo", "scale_rewards": "batch", "batch_size": 2, "grad_accumulation_steps": 4},
        {
            "importance_sampling_level": "sequence",
            "epsilon_high": 0.3,
            "delta": 2.0,
            "mask_truncated_completions": True,
        },
        {"fine_tune_type": "full", "learning_rate": 1e-3, "beta": 0.1},
        {"fine_tune_type": "dora", "adapter_format": "peft", "dropout": 0.1, "temp": 0.8, "top_p": 0.9},
        {"reward_funcs": (), "reward_regex": ("e", "^the"), "reward_weights": (0.5, 2.0), "optimizer": "adamw"},
    ],
)
def test_losses_and_methods_train_validate_and_test(here, changes):
    notes = Notes()
    done = tune(replace(SHORT, iters=3, steps_per_eval=3, val_batches=1, save_every=3, test=True, **changes), notes)
    rows = rows_of(here)
    assert all(row["grad_norm"] >= 0 for row in rows if "train_loss" in row)
    assert ("kl" in rows[1]) == ("beta" in changes)
    if "beta" in changes:
        kl = [row["kl"] for row in rows if "train_loss" in row]
        # Before training the model is its own reference.
        assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-5
    assert done.test is not None
    assert ("the reference model " in "\n".join(notes.lines)) == (changes.get("fine_tune_type") == "full")


def test_a_quantized_model_trains(here):
    convert("model", "packed", quantize=True, q_bits=4, q_group_size=32)
    tune(replace(SHORT, iters=1, val_batches=0, beta=0.1), model="packed")
    (base, _), (tuned, _) = load("packed"), load("packed", adapter_path="adapters")
    ids = mx.array([[1, 5, 9, 4]])
    assert mx.abs(tuned(ids) - base(ids)).max().item() > 1e-3


def test_testing_alone_measures_what_training_measured(here):
    trained = tune(replace(SHORT, iters=1, val_batches=0, test=True)).test
    alone = tune(replace(SHORT, train=False, test=True)).test
    assert alone.metrics == pytest.approx(trained.metrics) and alone.tokens == trained.tokens == 12


def test_epochs_count_passes_over_the_prompts(here):
    done = tune(replace(SHORT, epochs=1.0, num_iterations=2, val_batches=0, max_completion_length=2, save_every=14))
    assert done.training.steps == 14  # one prompt a step, each twice


def test_dropped_gradients_of_equal_rewards_change_nothing(here):
    tune(replace(SHORT, iters=1, val_batches=0, reward_funcs=(), reward_regex=("impossible",)))
    row = next(row for row in rows_of(here) if "train_loss" in row)
    assert row["grad_norm"] == 0 and row["frac_reward_zero_std"] == 1 and row["reward"] == 0


# Exact resume.


@pytest.mark.parametrize(
    "extra",
    [
        ("--num-iterations", 3, "--beta", 0.1, "--dropout", 0.1),
        *(pytest.param(extra, marks=pytest.mark.slow) for extra in [(), ("--fine-tune-type", "full", "--beta", 0.1)]),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(here, extra):
    flags = ("--train", "--model", "model", "--data", "data", "--batch-size", 4, "--num-generations", 4,
             "--max-completion-length", 6, "--max-seq-length", 48, "--iters", 5, "--learning-rate", 1e-3,
             "--steps-per-report", 3, "--steps-per-eval", 4, "--save-every", 1, "--val-batches", 1,
             "--reward-funcs", ",".join(FUNCTIONS), *extra)  # fmt: skip
    whole = run_here("grpo", *flags, "--adapter-path", "whole")
    assert whole.returncode == 0, whole.stderr
    output = kill_after(3, 0.01, *flags, "--adapter-path", "parts", folder=here, name="grpo")
    assert "error" not in output
    last = run_here("grpo", "--resume", "--adapter-path", "parts", "--json")
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout)["stopped"] == "finished"
    assert trained(here / "parts") == trained(here / "whole")
    assert metrics(here / "parts") == metrics(here / "whole")


def test_a_checkpoint_between_two_updates_keeps_their_completions(here, monkeypatch):
    """Stopped after each step and resumed, a run samples nothing twice, and ends with the same weights."""
    rolled = []
    roll = rollouts_module.Roller.roll
    monkeypatch.setattr(rollouts_module.Roller, "roll", lambda self, *a: rolled.append(a[2]) or roll(self, *a))
    options = replace(SHORT, num_iterations=2, val_batches=0)
    tune(replace(options, adapter_path="whole"))
    assert rolled == ["step 0", "step 1"]
    rolled.clear()
    for steps in (1, 2, 3, 4):
        tune(replace(options, adapter_path="parts", iters=steps, resume=steps > 1))
    assert rolled == ["step 0", "step 1"]
    assert trained(here / "parts") == trained(here / "whole")


def test_each_command_continues_its_own_runs_alone(here):
    tune(replace(SHORT, iters=1))
    other = run_here("lora", "--resume")
    assert "The run in adapters is one of `mlx-openelm grpo`; continue it with that command." in other.stderr
    with pytest.raises(RequestError, match="has temp 1.0, not 0.5"):
        tune(replace(SHORT, resume=True, temp=0.5))


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_two_processes_train_as_one(here):
    flags = ("--train", "--test", "--model", "model", "--data", "data", "--batch-size", 4, "--num-generations", 4,
             "--max-completion-length", 6, "--max-seq-length", 48, "--iters", 4, "--optimizer", "sgd",
             "--learning-rate", 1e-2, "--steps-per-report", 1, "--val-batches", 2, "--num-iterations", 2,
             "--beta", 0.1, "--reward-funcs", ",".join(FUNCTIONS))  # fmt: skip
    one = run_here("grpo", *flags, "--adapter-path", "one")
    assert one.returncode == 0, one.stderr
    two = launch(*command(*flags, "--adapter-path", "two", python=(), name="grpo"), folder=here)
    output, _ = two.communicate(timeout=400)
    assert two.returncode == 0, output
    for a, b in zip(metrics(here / "one"), metrics(here / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)


# Rewards and prompts.


def completions(*texts: str, chat: bool = False) -> list[Completion]:
    content = [{"role": "user", "content": "a"}] if chat else "a"
    return [Completion(Prompt([1, 5], content, {"goal": n}, ""), [7] * n, text) for n, text in enumerate(texts)]


def test_functions_are_called_as_trl_calls_them():
    seen: dict[str, Any] = {}

    def first(prompts, completions, completion_ids, **others):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **others)
        return [1, None]

    def second(completions):
        return (len(completion[0]["content"]) for completion in completions)

    rewards = make_rewards((), ("^a.$",), None, (first, second))
    assert rewards.names == ["first", "second", "regex"] and rewards.weights == (1.0, 1.0, 1.0)
    found = rewards(completions("ab", "abc", chat=True))
    assert [row[1:] for row in found] == [[2.0, 1.0], [3.0, 0.0]]
    assert found[0][0] == 1.0 and found[1][0] != found[1][0]
    assert seen == {
        "prompts": [[{"role": "user", "content": "a"}]] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in ("ab", "abc")],
        "completion_ids": [[], [7]],
        "goal": [0, 1],
    }
    assert make_rewards((), ("a", "b"), (1.0, 2.0)).names == ["regex_1", "regex_2"]


def test_what_a_function_prints_is_no_result(capsys):
    def chatty(completions):
        print("Look at", completions)
        return [0.0] * len(completions)

    make_rewards((), (), None, (chatty,))(completions("a"))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == "Look at ['a']\n"


@pytest.mark.parametrize("change", ["path", "path.remove(FOLDER)", "path.insert(0, FOLDER)"])
def test_importing_rewards_leaves_the_path_as_the_file_does(tmp_path, monkeypatch, change):
    path = [*sys.path, str(tmp_path), "after"]
    monkeypatch.setattr(sys, "path", [*path])
    lines = ("from sys import path", f"FOLDER = {str(tmp_path)!r}", change, "def one(**_): pass")
    (tmp_path / "r.py").write_text("\n".join(lines))
    make_rewards((f"{tmp_path}/r.py:one",), (), None)
    eval(change, {"path": path, "FOLDER": str(tmp_path)})
    assert sys.path == path


def test_functions_of_a_python_caller_train(here):
    def vowels(completions):
        return [sum(text.count(vowel) for vowel in "aeiou") / 10 for text in completions]

    def length(completions):
        return [float(len(text)) for text in completions]

    options = replace(SHORT, iters=1, val_batches=1, reward_funcs=())
    tune(options, reward_funcs=vowels)  # a list of one, as in TRL
    assert "rewards/vowels/mean" in rows_of(here)[1]
    with pytest.raises(RequestError, match="The run to resume has rewards vowels, not length"):
        tune(replace(options, iters=2, resume=True), reward_funcs=[length])
    tune(replace(options, iters=2, resume=True), reward_funcs=[vowels])
    with pytest.raises(RequestError, match="reward_funcs are functions, got 'rewards.py:early'"):
        tune(replace(options, adapter_path="other"), reward_funcs=["rewards.py:early"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": ()}, "There are no rewards; give reward_funcs FILE.py:NAME, or reward_regex"),
        ({"reward_funcs": ("rewards.py",)}, "reward_funcs must be FILE.py:NAME, got 'rewards.py'"),
        ({"reward_funcs": ("none.py:a",)}, "none.py does not exist"),
        ({"reward_funcs": ("rewards.py:none",)}, "rewards.py has no function 'none'"),
        ({"reward_funcs": ("rewards.py:not_a_function",)}, "rewards.py has no function 'not_a_function'"),
        ({"reward_funcs": ("rewards.py:later",)}, "later is an async function"),
        ({"reward_funcs": ("rewards.py:called_later",)}, "called_later is an async function"),
        ({"reward_funcs": ("bad.py:a",)}, r"bad.py cannot be imported: ZeroDivisionError: .* \(bad.py, line 2\)"),
        ({"reward_funcs": ("rewards.py:early",) * 2}, "Two rewards are called early"),
        ({"reward_regex": ("(",)}, r"reward_regex '\(' is not a regular expression"),
        ({"reward_weights": (1.0,)}, "reward_weights must have a number for each of the 2 rewards, got 1"),
        ({"num_generations": 1}, "num_generations must be 2 or more"),
        ({"batch_size": 6}, "batch_size 6 x grad_accumulation_steps 1 = 6 completions .* such as 8"),
        ({"max_completion_length": 48}, "max_completion_length must be less than max_seq_length"),
        ({"temp": 0.0}, "temp must be more than 0, got 0: completions must differ"),
        ({"epsilon": 2.0}, "epsilon must be 0 to 1, got 2"),
        ({"loss_type": "dpo"}, "loss_type must be grpo, dapo, dr_grpo or bnpo, got 'dpo'"),
        ({"scale_rewards": "x"}, "scale_rewards must be group, batch or none"),
        ({"beta": -1.0}, "beta must be 0 or more"),
        ({"packing": True}, "packing is for `mlx-openelm lora`"),
        ({"long_examples": "refuse", "max_seq_length": 8}, "train.jsonl, line 2: takes 3 tokens.* leaves 2; raise one"),
        ({"max_seq_length": 7}, "No prompt leaves room for max_completion_length 6 in max_seq_length 7"),
    ],
)  # fmt: skip
def test_invalid_requests_are_refused(here, changes, message):
    (here / "bad.py").write_text("def a(completions): ...\n1 / 0\n")
    with pytest.raises(RequestError, match=f"^{message}"):
        tune(replace(SHORT, **changes))
    assert not (here / "adapters" / "run.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"The reward function fails failed: ZeroDivisionError: division by zero \(rewards.py, line 12\)"),
        ("leaves", r"The reward function leaves failed: SystemExit \(rewards.py, line 15\)"),
        ("too_few", "The reward function too_few returned 1 reward for 4 completions; it must return one for each"),
    ],
)
def test_a_function_that_fails_stops_before_anything_is_written(here, name, message):
    with pytest.raises(OpenELMError, match=f"^{message}"):
        tune(replace(SHORT, reward_funcs=(f"rewards.py:{name}",)))
    assert not (here / "adapters" / "run.json").exists()


def test_held_out_prompts_to_which_no_reward_applies_are_named(here):
    with pytest.raises(OpenELMError, match=r"^No reward applies to any of the 4 completions .*: never returned None"):
        tune(replace(SHORT, reward_funcs=("rewards.py:never",), val_batches=1))


def test_completions_without_any_reward_are_warned_of_once(here):
    notes = Notes()
    tune(replace(SHORT, reward_funcs=("rewards.py:never",), val_batches=0, iters=2), notes)
    (warning,) = (line for line in notes.lines if line.startswith("No reward applies"))
    assert warning.startswith("No reward applies to 4 of the 4 completions of step 1: never returned None or NaN")
    notes = Notes()
    tune(replace(SHORT, val_batches=0, iters=2), notes, overwrite=True)
    assert not any(line.startswith("No reward applies") for line in notes.lines)


def test_prompts_are_rendered_as_fine_tuning_renders_them():
    _, tokenizer = load("tiny-instruct")
    turn = [{"role": "user", "content": "Hello."}]
    read = partial(tokenize_prompts, tokenizer=tokenizer, max_seq_length=64, max_completion_length=8)
    for prompt in ("Hello.", turn):
        (found,) = read([Record({"prompt": prompt, "answer": 4}, "x")]).examples
        assert found.tokens == tokenizer.apply_chat_template(turn) and found.columns == {"answer": 4}
        assert found.content == prompt
        (found,) = read([Record({"prompt": prompt, "system": "Be brief."}, "x")]).examples
        whole = [{"role": "system", "content": "Be brief."}, *turn]
        assert found.tokens == tokenizer.apply_chat_template(whole)
    with pytest.raises(RequestError, match="x: 'system' needs a chat template"):
        read([Record({"prompt": "Hello.", "system": "Be brief."}, "x")], chat_template="plain")
    (found,) = read([Record({"prompt": "Hello."}, "x")], chat_template="plain").examples
    assert found.tokens == tokenizer.encode("Hello.")
    long = read([Record({"prompt": "Hello. " * n}, "x") for n in (1, 50)])
    assert len(long.examples) == long.report.num_dropped == 1
    assert "prompt was left out, longer than max_seq_length 64 less" in "\n".join(long.report.lines("train", 64))
    assert long.fingerprint() != read([Record({"prompt": "Hello. ", "answer": 1}, "x")]).fingerprint()
    for values, message in (
        ({"prompt": 3}, "x: 'prompt' is a number, not text or messages"),
        ({"prompt": ""}, "x: 'prompt' is empty"),
        ({"prompt": None}, "x: 'prompt' is null; give it a value"),
        ({"text": "a"}, r"x: has none of the known sets of keys \(prompt\)"),
    ):
        with pytest.raises(RequestError, match=f"^{message}"):
            read([Record(values, "x")])


# The command.


def test_every_option_has_a_flag_with_its_help_text():
    parser, _ = cli_command("grpo")
    hints = get_type_hints(GRPOOptions, include_extras=True)
    without = {"z_loss", "mask_prompt", "packing", "label_smoothing"}
    for field in fields(GRPOOptions):
        assert (f"--{field.name.replace('_', '-')}" in parser.flags) == (field.name not in without), field.name
        if field.name not in without:
            text = hints[field.name].__metadata__[0].help
            assert text[0].isupper() and text.endswith("."), field.name


def test_defaults_are_trls():
    config = pytest.importorskip("trl.trainer.grpo_config", exc_type=ImportError).GRPOConfig
    theirs = {field.name: field.default for field in fields(config)}
    ours = GRPOOptions()
    for name in ("num_generations", "num_generations_eval", "max_completion_length", "beta", "epsilon", "epsilon_high",
                 "delta", "num_iterations", "loss_type", "scale_rewards", "reward_weights", "learning_rate", "top_p",
                 "top_k", "importance_sampling_level", "mask_truncated_completions"):  # fmt: skip
        assert getattr(ours, name) == theirs[name], name
    assert (ours.temp, ours.batch_size) == (theirs["temperature"], 8)


def test_options_of_fine_tuning_have_the_same_defaults_but_for_two():
    ours, other = GRPOOptions(), FineTuneOptions()
    changed = {f.name for f in fields(FineTuneOptions) if getattr(ours, f.name) != getattr(other, f.name)}
    assert changed == {"batch_size", "learning_rate"}


def test_flags_and_files_give_the_same_options(here, monkeypatch):
    seen = []

    def remember(model, options, **rest):
        seen.append(options)
        raise RequestError("Seen.")

    monkeypatch.setattr("mlx_openelm.cli.grpo.grpo", remember)
    (here / "run.yaml").write_text(
        "reward_funcs: [a.py:b, c.py:d]\nreward_regex: 'x{1,2}'\nreward_weights: [1, 2, 3]\nloss_type: grpo\n"
    )
    (here / "one.yaml").write_text(
        "reward_funcs: a.py:b, c.py:d\nreward_regex: ['x{1,2}']\nreward_weights: [1, 2, 3]\nloss_type: grpo\n"
    )
    last = ["--reward-regex", "x{1,2}", "--loss-type", "grpo"]
    for words in (
        ["-c", "run.yaml"],
        ["-c", "one.yaml"],
        ["--reward-funcs", "a.py:b,c.py:d", "--reward-weights", "1,2,3", *last],
        ["--reward-funcs", "a.py:b", "--reward-funcs", "c.py:d", *(f"--reward-weights={n}" for n in (1, 2, 3)), *last],
    ):
        with pytest.raises(SystemExit):
            main(["grpo", *words])
    assert seen[0].reward_funcs == ("a.py:b", "c.py:d") and seen[0].reward_regex == ("x{1,2}",)
    assert seen[0].reward_weights == (1.0, 2.0, 3.0) and seen == [seen[0]] * 4


def test_the_command_prints_rewards(here, monkeypatch):
    drawn = {}
    monkeypatch.setattr(metrics_module, "draw", lambda curves, path, title: drawn.update(curves) or path.touch())
    monkeypatch.setattr(finetune_module, "Metrics", Metrics)  # which plots
    flags = ("--train", "--test", "--model", "model", "--data", "data", "--iters", 2, "--batch-size", 4,
             "--num-generations", 4, "--max-completion-length", 6, "--max-seq-length", 48, "--val-batches", 1,
             "--reward-funcs", ",".join(FUNCTIONS), "--beta", 0.1)  # fmt: skip
    done = run_here("grpo", *flags)
    assert done.returncode == 0, done.stderr
    assert "Trained 2 steps, 8 completions, " in done.stdout
    assert "Test reward " in done.stdout and " tokens a completion, 12 completions" in done.stdout
    assert "Step 0: validation reward " in done.stderr and ", KL " in done.stderr
    assert (here / "adapters" / "losses.png").exists()
    labels = ["loss", "reward", "KL divergence", "tokens a completion", "learning rate"]
    assert [axes.get_ylabel() for axes in figure(drawn).axes] == labels


def test_the_plot_shows_rewards_and_divergence():
    curves = {name: [(1, 0.5), (2, 0.75)] for name in ("train_loss", "val_loss", "learning_rate")}
    curves |= {name: [(1, 0.5), (2, 0.75)] for name in ("reward", "val_reward", "kl", "completions/mean_length")}
    found = figure(curves)
    labels = ["loss", "reward", "KL divergence", "tokens a completion", "learning rate"]
    assert [axes.get_ylabel() for axes in found.axes] == labels
    # The validation loss is minus the reward, which has a place of its own.
    assert [len(axes.lines) for axes in found.axes] == [1, 2, 1, 1, 1]
