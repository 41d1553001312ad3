"""The `lora` command: precedence of flags, file and defaults, its output, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from mlx_openelm.cli import lora, tuning
from mlx_openelm.cli.main import command as cli_command
from mlx_openelm.cli.main import main
from mlx_openelm.training.finetune import FineTuned, Loading
from mlx_openelm.training.options import FineTuneOptions
from mlx_openelm.training.run.trainer import Result

import pytest
from in_process import run_here
from training_runs import command, environment, metrics, run, trained, write_run_folder

# Small enough to finish within a second.
SMALL = ("--train", "--model", "model", "--data", "data", "--iters", 6, "--max-seq-length", 48, "--rank", 2,
         "--learning-rate", 1e-2, "--steps-per-report", 2, "--steps-per-eval", 3, "--val-batches", -1)  # fmt: skip


def exit_code(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run_folder(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def arguments(monkeypatch) -> dict[str, Any]:
    """The arguments of `finetune`, which is replaced."""
    seen: dict[str, Any] = {}

    def finetune(model, options, *, loading, overwrite, listener):
        seen.update(model=model, options=options, loading=loading, overwrite=overwrite)
        return FineTuned(model, None, 0, 1)

    monkeypatch.setattr(lora, "finetune", finetune)
    return seen


def test_every_option_has_a_flag_with_its_help_text():
    parser, _ = cli_command("lora")
    texts = [kind.__metadata__[0].help for kind in get_type_hints(FineTuneOptions, include_extras=True).values()]
    assert {f"--{field.name.replace('_', '-')}" for field in fields(FineTuneOptions)} < set(parser.flags)
    assert len(set(texts)) == len(texts)
    assert all(text[0].isupper() and text.endswith(".") for text in texts)


def test_without_flags_options_have_their_defaults(arguments):
    assert exit_code(["lora"]) == 0
    assert arguments == {"model": "tiny", "options": FineTuneOptions(), "loading": Loading(), "overwrite": False}


def test_every_flag_reaches_its_option(arguments):
    words = ["lora", "--model", "m", "--dtype", "float32", "--tokenizer", "t", "--revision", "r", "--chat-template",
             "corenet", "--config-yaml", "y", "--overwrite"]  # fmt: skip
    expected: dict[str, Any] = {}
    kinds = get_type_hints(FineTuneOptions)
    for number, field in enumerate(fields(FineTuneOptions), 3):
        flag, kind = f"--{field.name.replace('_', '-')}", kinds[field.name]
        if field.name in ("target_modules", "sample_prompts"):
            words += [flag, f"a{number}", flag, "b"]
            expected[field.name] = (f"a{number}", "b")
        elif kind is bool:
            words.append(f"--no-{flag[2:]}" if field.default else flag)
            expected[field.name] = not field.default
        else:
            value: Any = number + 0.5 if "float" in str(kind) else number if "int" in str(kind) else f"w{number}"
            words += [flag, str(value)]
            expected[field.name] = value
    for one in ("--epochs", "--scale", "--resume"):  # these exclude others
        index = words.index(one)
        del words[index : index + (1 if one == "--resume" else 2)]
        del expected[one[2:]]
    assert exit_code(words) == 0
    assert arguments["options"] == FineTuneOptions(**expected)
    assert arguments["model"] == "m" and arguments["overwrite"]
    assert arguments["loading"] == Loading("float32", "t", "y", "r", "corenet")


def test_flags_override_the_file_and_the_file_overrides_defaults(arguments, tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("model: small\ntrain: true\nrank: 16\nlearning_rate: 3e-4\nbias_correction: false\n"
                    "target_modules: [qkv_proj]\ngrad_checkpoint: true\nseed: 7\n")  # fmt: skip
    assert exit_code(["lora", "-c", str(file)]) == 0
    from_file = FineTuneOptions(train=True, rank=16, learning_rate=3e-4, bias_correction=False, grad_checkpoint=True,
                                target_modules=("qkv_proj",), seed=7)  # fmt: skip
    assert (arguments["model"], arguments["options"]) == ("small", from_file)
    # A flag with the value of a default is given all the same.
    words = ["--rank", "8", "--no-grad-checkpoint", "--bias-correction", "--seed", "0", "--model", "other",
             "--target-modules", "proj_1, proj_2"]  # fmt: skip
    assert exit_code(["lora", "--config", str(file), *words]) == 0
    assert arguments["model"] == "other"
    assert arguments["options"] == FineTuneOptions(train=True, learning_rate=3e-4, target_modules=("proj_1", "proj_2"))


def test_a_file_and_resume_train(arguments, tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("rank: 16\n")
    assert exit_code(["lora", "-c", str(file), "--resume"]) == 0
    assert arguments["options"] == FineTuneOptions(train=True, resume=True, rank=16)


def test_a_second_file_is_refused(capsys):
    assert exit_code(["lora", "-c", "a.yaml", "--config", "b.yaml"]) == 2
    assert "--config takes one file" in capsys.readouterr().err


def test_a_run_and_what_it_prints(folder):
    done = run(*SMALL, "--test", "--sample-prompt", "the king", "--sample-tokens", 3, folder=folder)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert any(re.fullmatch(r"Trainable parameters: \d+\.\d{3}% \(0\.\d{3}M/0\.\d{3}M\)", line) for line in said)
    steps = [line for line in said if re.match(r"Step [246] of 6: train loss \d", line)]
    assert len(steps) == 3 and all(re.search(r"tokens/s, peak [\d.]+ MB", line) for line in steps)
    assert "left" not in steps[0] and re.search(r", 0:0\d left$", steps[2])
    assert [line.split(":")[0] for line in said if "validation loss" in line] == ["Step 0", "Step 3", "Step 6"]
    assert "Trained 6 steps, " in done.stdout and "Test loss" in done.stdout and "perplexity" in done.stdout
    assert "before" in done.stdout and "after" in done.stdout
    names = {path.name for path in (folder / "adapters").iterdir()}
    assert {"adapters.safetensors", "adapter_config.json", "run.json", "metrics.jsonl", "checkpoints"} <= names
    record = json.loads((folder / "adapters" / "run.json").read_text())
    assert record["model"] == "model" and record["options"]["rank"] == 2
    assert record["command"][:2] == ["mlx-openelm", "lora"] and "--sample-prompt" in record["command"]
    assert set(record["versions"]) == {"mlx_openelm", "mlx", "python"} and record["data"]["train"] == 23

    # Continued without a word about it, with more steps.
    more = run_here("lora", "--resume", "--iters", 8, "--json", folder=folder)
    assert more.returncode == 0, more.stderr
    result = json.loads(more.stdout)
    assert (result["steps"], result["total_steps"], result["stopped"]) == (8, 8, "finished")
    assert result["adapter_path"] == "adapters" and result["samples"][0]["prompt"] == "the king"
    assert result["test_perplexity"] > 1 and result["tokens_per_second"] > 0 and result["peak_memory"] > 0
    assert metrics(folder / "adapters")[-1]["step"] == 8

    refused = run_here("lora", *SMALL, folder=folder)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "--resume" in refused.stderr and "--overwrite" in refused.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--train"),
        (("--train",), "--data is needed"),
        (("--resume", "--adapter-path", "none"), "no run in none to --resume"),
        (("--train", "--rank", "eight"), "--rank must be a whole number"),
        (("--train", "--data", "data", "--optimizer", "adamm"), "--optimizer must be adam"),
        (("-c", "none.yaml"), "none.yaml does not exist"),
        (("--train", "--data", "nowhere", "--adapter-path", "new"), "no folder or file nowhere"),
        (("--train", "--data", "data", "--adapter-path", "data/train.jsonl/x"), "train.jsonl is a file, not a folder"),
        (("--test", "--data", "data", "--adapter-path", "none"), "There is no adapter in none"),
        (("--test", "--data", "nowhere", "--adapter-path", "data"), "data has no adapter_config.json"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(words, named, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert exit_code(["lora", *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert named in output.err


def test_ctrl_c_saves_and_says_how_to_resume(folder):
    words = command(*SMALL[:5], "--iters", 100000, "--max-seq-length", 48, "--rank", 2, "--adapter-path", "stopped run")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
                               cwd=folder,  # and the parent may ignore Ctrl-C, as a shell's background jobs do
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("Step 10 "):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Ctrl-C again stops at once" in errors and "Traceback" not in errors
    step = re.search(r"Stopped after step (\d+) of 100,000", output)
    assert step is not None
    assert "continue with:\n  mlx-openelm lora --resume --adapter-path 'stopped run'\n" in output
    assert re.search(
        r"^Validation loss \d+\.\d{3} at step 0, before training \(not validated after that\)$", output, re.M
    )
    assert f"Wrote stopped run: the weights of step {step[1]}, the last; use it with" in output
    assert (folder / "stopped run" / "checkpoints" / f"{int(step[1]):07d}" / "state.json").exists()
    assert (folder / "stopped run" / "adapters.safetensors").exists()


def summary(
    *,
    steps=60,
    val=(1.1, 60),
    best=(1.1, 60),
    stopped="finished",
    kept=60,
    checkpoint=None,
    counts="tokens",
    count=5000,
) -> list[str]:
    result = Result(steps, 60, stopped, 1.0, *val, best[1], best[0], count, 9.0, 555.0, 0.056)
    done = FineTuned("tiny", "my run", 1, 2, result, adapter_step=kept, best_checkpoint=checkpoint,
                     counts=counts)  # fmt: skip
    return list(tuning.summary(done))


def test_the_summary_names_the_steps_of_losses_and_weights():
    wrote = "use it with --adapter-path 'my run'"
    assert summary() == [
        "Trained 60 steps, 5,000 tokens learned, 555 tokens/s, peak memory 56.0 MB",
        "Validation loss 1.100 at step 60, the lowest",
        f"Wrote my run: the weights of step 60, the last; {wrote}",
    ]
    assert summary(best=(0.9, 40), checkpoint="my run/checkpoints/0000040")[1:] == [
        "Validation loss 1.100 at step 60; the lowest was 0.900 at step 40",
        f"Wrote my run: the weights of step 60, the last; {wrote}",
        "The weights with the lowest validation loss are in my run/checkpoints/0000040",
    ]
    assert summary(best=(0.9, 0))[1] == (
        "Validation loss 1.100 at step 60; the lowest was 0.900 at step 0, before training"
    )
    early = summary(steps=50, val=(1.1, 50), best=(0.9, 40), stopped="stopped early", kept=40)
    assert early[2] == (
        f"Wrote my run: the weights of step 40, where the validation loss was lowest (stopped early, after step 50 of "
        f"60); {wrote}"
    )
    stopped = summary(steps=18, val=(11.7, 0), best=(11.7, 0), stopped="interrupted", kept=18)
    assert stopped[1:] == [
        "Validation loss 11.700 at step 0, before training (not validated after that)",
        f"Wrote my run: the weights of step 18, the last; {wrote}",
        "Stopped after step 18 of 60, and saved; continue with:",
    ]
    later = summary(steps=18, val=(3.275, 10), best=(3.275, 10), stopped="interrupted", kept=18)
    assert later[1] == "Validation loss 3.275 at step 10, the lowest (not validated after that)"
    assert summary(val=(None, None), best=(None, None))[1].startswith("Wrote")
    assert summary(steps=1, counts="pairs", count=1)[0].startswith("Trained 1 step, 1 pair, ")
    assert summary(steps=2, counts="pairs", count=2)[0].startswith("Trained 2 steps, 2 pairs, ")
    # The validation loss of rewards is minus their mean.
    rewarded = summary(val=(-0.5, 60), best=(-0.75, 40), kept=40, checkpoint="x", counts="completions")
    assert rewarded[1:] == [
        "Validation reward 0.500 at step 60; the highest was 0.750 at step 40",
        f"Wrote my run: the weights of step 40, where the validation reward was highest; {wrote}",
        "The weights with the highest validation reward are in x",
    ]


def test_errors_about_settings_name_the_file_they_came_from(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (tmp_path / "lora.yaml").write_text("rank: 0\ntrain: true\n")
    assert exit_code(["lora", "-c", str(tmp_path / "lora.yaml"), "--data", "data"]) == 2
    assert capsys.readouterr().err == (
        f"error: --rank must be 1 or more, got 0. rank is set in {tmp_path / 'lora.yaml'}.\n"
    )
    assert exit_code(["lora", "-c", str(tmp_path / "lora.yaml"), "--data", "data", "--rank", "-1"]) == 2
    assert capsys.readouterr().err == "error: --rank must be 1 or more, got -1.\n"
    run_here("lora", *SMALL, "--iters", 2, "--val-batches", 0, "--adapter-path", "saved", folder=folder)
    assert exit_code(["lora", "--resume", "--adapter-path", "saved", "--early-stop", "2", "--val-batches", "0"]) == 2
    assert "saved" not in capsys.readouterr().err
    assert exit_code(["lora", "--resume", "--adapter-path", "saved", "--iters", "1"]) == 2
    assert "after step 2 already" in capsys.readouterr().err
    assert exit_code(["lora", "--resume", "--adapter-path", "saved", "--min-learning-rate", "1"]) == 2
    assert capsys.readouterr().err.endswith(" learning_rate is set in saved/run.json.\n")
    assert exit_code(["lora", "--resume", "--adapter-path", "saved", "--rank", "4"]) == 2
    assert "--rank 2, not 4 (see saved/run.json)" in capsys.readouterr().err


@pytest.mark.parametrize("began", [False, True])
def test_ctrl_c_before_training_says_that_nothing_was_saved(began, monkeypatch, capsys):
    def finetune(model, options, *, listener, **_):
        if began:
            listener.started(0, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(lora, "finetune", finetune)
    assert exit_code(["lora", "--train", "--data", "data"]) == 130
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == ("" if began else "Stopped before training began; nothing was saved.\n")


def test_on_a_terminal_there_is_one_live_line(folder):
    terminal, theirs = pty.openpty()
    words = command(*SMALL[:5], "--iters", 60, "--max-seq-length", 48, "--steps-per-report", 30, "--adapter-path",
                    "live", "--val-batches", 2)  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, cwd=folder,
                               env=environment() | {"TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    shown = _read_all(terminal, process)
    assert process.wait() == 0, shown
    live = re.findall(r"(\d+)/60 .*?loss \d+\.\d+  \d+:\d\d left  [\d,]+ tokens/s  [\d.]+ MB", shown)
    assert len(set(live)) > 2
    assert re.search(r"Step 30 of 60: train loss", shown)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is visible again


@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.slow)])
def test_lines_are_broken_between_words(columns, folder):
    words = command(*SMALL, "--overwrite", "--adapter-path", f"narrow{columns}")
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(words, stdout=theirs, stderr=theirs, cwd=folder,
                               env=environment() | {"TERM": "xterm", "COLUMNS": str(columns)})  # fmt: skip
    os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _read_all(terminal, process))
    lines = re.split(r"[\r\n]+", shown)
    assert process.wait() == 0 and max(map(len, lines)) <= columns
    whole = " ".join(line.strip() for line in lines)
    assert re.search(
        r"Step 6 of 6: train loss \d\.\d+, learning rate 0.01, [\d,]+ tokens/s, peak [\d.]+ MB, 0:0\d left", whole
    )
    assert re.search(r"Wrote narrow\d+: the weights of step 6, the last; use it with --adapter-path narrow", whole)
    assert not any(re.search(r" [\d.]+$", line) for line in lines if re.match("Step|Trained|Memory", line))


def _read_all(terminal: int, process: subprocess.Popen) -> str:
    data, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            data += piece
        elif process.poll() is not None:
            break
    return data.decode(errors="replace")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        words = (*SMALL, "--adapter-path", disk / "run", "--save-every", 1, "--keep-last", 9)
        stopped = run_here("lora", *words, folder=folder)
        assert stopped.returncode == 1
        errors = [line for line in stopped.stderr.splitlines() if "error" in line]
        assert len(errors) == 1 and "No space left on device" in errors[0] and "is intact" in errors[0], errors
        subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
        resumed = run_here("lora", "--resume", "--adapter-path", disk / "run", folder=folder)
        assert resumed.returncode == 0, resumed.stderr
        whole = run_here("lora", *SMALL, "--adapter-path", "whole", "--save-every", 1, folder=folder)
        assert whole.returncode == 0
        assert trained(disk / "run") == trained(folder / "whole")
        assert metrics(disk / "run") == metrics(folder / "whole")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
