"""The package as Python code meets it: names, types, help, representations, errors and progress."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import mlx_openelm
from mlx_openelm import (
    FineTuneOptions,
    ModelConfig,
    OpenELM,
    QuantizeOptions,
    TokenizerOptions,
    backend,
    console,
    convert,
    errors,
    finetune,
    generate,
    load,
    quantize,
    stream_generate,
    train_tokenizer,
)
from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.generation.keywords import GenerationKeywords
from mlx_openelm.generation.options import GenerationOptions
from mlx_openelm.keywords import KeywordError
from mlx_openelm.quantization.options import QuantizeKeywords

import pytest
from huggingface_hub import constants
from processes import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", dtype="float32")


WRONG = """\
from mlx_openelm import generate, load, stream_generate

model, tokenizer = load("tiny")
text: str = generate(model, tokenizer, prompt="Once", max_tokens=5, temp=0.8, stop=["end"])
generate(model, tokenizer, "Once", max_token=5)
for piece in stream_generate(model, tokenizer, "Once", top_k="five"):
    number: str = piece.token
"""
LAZY_NAMES = [name for name in mlx_openelm.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def mypys_lines(tmp_path_factory) -> list[str]:
    """What `mlx_openelm`'s users read from `mypy --strict` about their code, of two files."""
    folder = tmp_path_factory.mktemp("mypy")
    (folder / "wrong.py").write_text(WRONG)
    (folder / "names.py").write_text("".join(f"from mlx_openelm import {n}\nreveal_type({n})\n" for n in LAZY_NAMES))
    # With the project's settings (strict), so that what mypy knows of the package from checking it serves here too.
    command = [sys.executable, "-m", "mypy", "--no-error-summary", f"--config-file={ROOT / 'pyproject.toml'}"]
    command += [f"--cache-dir={ROOT / '.mypy_cache'}", "wrong.py", "names.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"MYPYPATH": str(ROOT)})
    return (run.stdout + run.stderr).splitlines()


def test_mypy_sees_wrong_names_and_types(mypys_lines):
    errors = [line for line in mypys_lines if ": error: " in line]
    assert [line.split(": ")[0] for line in errors] == [f"wrong.py:{n}" for n in (5, 6, 7)]
    wrong = "\n".join(mypys_lines)
    assert 'Unexpected keyword argument "max_token" for "generate"; did you mean "max_tokens"' in wrong
    assert '"top_k" to "stream_generate" has incompatible type "str"; expected "int"' in wrong


@pytest.mark.parametrize(
    ("keywords", "options"), [(GenerationKeywords, GenerationOptions), (QuantizeKeywords, QuantizeOptions)]
)
def test_the_typed_keywords_are_the_options(keywords, options):
    types = get_type_hints(options)  # without the help of the flags
    assert get_type_hints(keywords) == {field.name: types[field.name] for field in fields(options)}


@pytest.mark.parametrize(
    ("function", "options", "first"),
    [
        (generate, GenerationOptions, ["model", "tokenizer", "prompt"]),
        (stream_generate, GenerationOptions, ["model", "tokenizer", "prompt"]),
        (quantize, QuantizeOptions, ["model", "mlx_path", "options"]),
        (train_tokenizer, TokenizerOptions, ["data", "output", "progress"]),
    ],
)
def test_the_signature_lists_the_options(function, options, first):
    shown = inspect.signature(function).parameters
    for field in fields(options):
        assert shown[field.name].default == field.default
    assert list(shown)[:3] == first
    assert not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in shown.values())
    assert str(inspect.signature(generate).parameters["kv_bits"]) == "kv_bits: int | None = None"


NOT_A_NAME = "surely_no_option"


@pytest.mark.parametrize("name", sorted(set(mlx_openelm.__all__) - {"__version__", "Listener"}))
def test_every_public_function_and_class_refuses_unknown_names(name):
    public = getattr(mlx_openelm, name)
    with pytest.raises(TypeError, match=f"has no option {NOT_A_NAME}; ") as caught:
        public(**{NOT_A_NAME: 1})
    assert isinstance(caught.value, RequestError)
    assert pickle.loads(pickle.dumps(public)) is public
    assert NOT_A_NAME not in inspect.signature(public).parameters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert("tiny", q_bit=7), "convert has no option q_bit; did you mean q_bits?"),
        (lambda: quantize("tiny", q_bit=7), "quantize has no option q_bit; did you mean q_bits?"),
        (lambda: FineTuneOptions(iter=3), "FineTuneOptions has no option iter; did you mean iters?"),
        (lambda: GenerationOptions(temperature=1), "GenerationOptions has no option temperature; did you mean temp?"),
        (lambda: FineTuneOptions(lora_rank=3), "FineTuneOptions has no option lora_rank; did you mean rank?"),
        (
            lambda: FineTuneOptions(use_dora=True),
            'FineTuneOptions has no option use_dora; did you mean fine_tune_type="dora"?',
        ),
        (lambda: finetune("tiny", data="x"), "finetune has no option data; did you mean data of FineTuneOptions?"),
        (lambda: finetune("tiny", dtyp="x"), "finetune has no option dtyp; did you mean dtype of Loading?"),
        (lambda: load(path_or_hf_repo="tiny"), "load has no option path_or_hf_repo; did you mean model?"),
        (lambda: load("tiny", lazy=True), "lazy is not offered: load reads the weights at once."),
        (lambda: load("tiny", trust_remote_code=True), "trust_remote_code is not needed: no repository code is run."),
        (
            lambda: generate(num_beams=2),
            "num_beams is not offered: text is decoded greedily or sampled, without beams.",
        ),
        (lambda: generate(volume=5), "generate has no option volume; help(generate) lists the options."),
        (
            lambda: convert("tiny", export_gguf=True),
            "export_gguf is not offered: run `mlx-openelm export --format gguf` on the fused folder.",
        ),
    ],
)
def test_a_wrong_name_gets_a_suggestion(call, message):
    with pytest.raises(KeywordError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["lazy", "model_config", "return_config", "quant_predicate", "do_sample", "stream"])
def test_names_of_mlx_lm_that_are_not_offered_say_why(name):
    with pytest.raises(KeywordError, match=f"^{name} is not offered: "):
        load("tiny", **{name: True})


def test_defaults_of_mlx_lm_that_are_spelled_out_change_nothing():
    _, tokenizer = load("tiny", lazy=False, return_config=False, model_config={}, trust_remote_code=False)
    assert tokenizer.vocab_size == 2048
    with pytest.raises(KeywordError, match="^lazy is not offered"):
        load("tiny", lazy=0)


def test_arguments_beyond_the_positional_ones_are_not_taken_for_others(tmp_path):
    with pytest.raises(TypeError, match="positional arguments"):
        convert("tiny", tmp_path / "new", True)
    with pytest.raises(RequestError, match="adapter eos_token must be a number.*are given by name"):
        load("tiny", {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "must be text or a list of token ids, got None"),
        (5, "must be text or a list of token ids, got 5"),
        (b"hi", "must be text or a list of token ids"),
        (["a", "b"], "whole numbers; got 'a'; several prompts are for batch_generate"),
    ],
)
def test_prompts_of_other_types_are_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        generate(*load("tiny"), prompt)


def test_a_warning_names_the_line_that_called(monkeypatch):
    monkeypatch.setattr(backend, "slow_cpu_warning", lambda: "This is slow.")
    with pytest.warns(UserWarning, match="This is slow") as caught:
        load("tiny")
    assert caught[0].filename == __file__


def test_quantize_takes_its_options_as_keywords_or_together(tmp_path):
    convert("tiny", tmp_path / "full", dequantize=True)
    with pytest.raises(RequestError, match="^options and q_bits both say how to quantize; give one of them"):
        quantize(tmp_path / "full", tmp_path / "out", QuantizeOptions(q_bits=4), q_bits=3)
    with pytest.raises(RequestError, match="^target_bpw chooses bits and groups itself; leave q_bits out"):
        quantize(tmp_path / "full", tmp_path / "out", q_bits=4, target_bpw=4.5)
    done = quantize(tmp_path / "full", tmp_path / "out", q_bits=3, q_group_size=32)
    assert {(choice.bits, choice.group_size) for choice in done.choices.values()} == {(3, 32)}
    assert QuantizeOptions(method="awq,gptq").method == ("awq", "gptq")  # type: ignore[arg-type]


def test_how_to_quantize_again_is_said_in_python(monkeypatch):
    advice = 'unpack it first, with two calls: `convert("tiny", "tiny-unpacked", dequantize=True)`, then '
    with pytest.raises(RequestError) as caught:
        quantize("tiny", "small", q_bits=4)
    assert str(caught.value).endswith(advice + '`quantize("tiny-unpacked", "small", q_bits=4)`.')
    monkeypatch.setattr(errors, "names_flags", True)
    with pytest.raises(RequestError, match="with two commands: `mlx-openelm convert --model tiny --dequantize"):
        quantize("tiny", "small", q_bits=4)


def test_help_begins_with_what_the_package_is(tmp_path):
    assert (mlx_openelm.__doc__ or "").startswith(
        "mlx-openelm: Apple's OpenELM language models in MLX, on CPUs and GPUs."
    )


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script that has our package, and no network."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120
    )


def test_the_guide_runs_as_written_and_prints_what_it_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    guide = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    exec("\n".join(blocks), {"__name__": "guide"})
    out, err = capfd.readouterr()
    promised = re.findall(r"print\(.*\)  # (.+)", guide)
    assert len(promised) == 4
    for line in promised:
        assert line.removesuffix("...)") in out
    assert "Step 4 of 4: train loss" in err  # finetune's progress, in plain lines
    assert set(mlx_openelm.__all__) <= {*re.findall(r"\w+", guide), "__version__", "CacheOptions", "ModelConfig"}


def test_dir_lists_the_public_names(tmp_path):
    done = python("import mlx_openelm, sys; print(*dir(mlx_openelm)); print('mlx.core' in sys.modules)", tmp_path)
    names, loaded = done.stdout.splitlines()
    assert names.split() == mlx_openelm.__all__ == sorted(mlx_openelm.__all__) and loaded == "False"
    assert all(hasattr(mlx_openelm, name) for name in mlx_openelm.__all__)
    assert set(mlx_openelm._HOMES) == set(mlx_openelm.__all__) - {"__version__"}
    assert "Did you mean: 'generate'" in python("import mlx_openelm; mlx_openelm.generat", tmp_path).stderr


def test_mypy_knows_every_lazy_name(mypys_lines):
    shown = [line.partition("Revealed type is ")[2] for line in mypys_lines if "Revealed type" in line]
    assert len(shown) == len(LAZY_NAMES) and not any(text.strip('"') == "Any" for text in shown)
    assert not any(line.startswith("names.py") and ": error: " in line for line in mypys_lines)
    assert (ROOT / "mlx_openelm" / "py.typed").is_file()


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("--q-bits must be 4.", "q_bits must be 4."),
        ("Choose either -q or --dequantize.", "Choose either quantize or dequantize."),
        ("out exists; replace it with --overwrite.", "out exists; replace it with overwrite=True."),
        ("--report, --report-data (--beta2).", "report, report_data (beta2)."),
        ("Run `mlx-openelm convert -q --model x` first.", "Run `mlx-openelm convert -q --model x` first."),
        ("models--apple--OpenELM in a/--x and 'a--b'.", "models--apple--OpenELM in a/--x and 'a--b'."),
    ],
)
def test_errors_name_arguments_in_python(written, shown, monkeypatch):
    assert str(OpenELMError(written)) == str(RequestError(written)) == shown
    monkeypatch.setattr(errors, "names_flags", True)
    assert str(OpenELMError(written)) == written


def test_the_same_error_names_the_flag_on_the_command_line(tiny, capsys):
    with pytest.raises(RequestError, match="^temp must be between 0 and 1000, got -1"):
        generate(*tiny, "Once", temp=-1)
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "Once", "--temp", "-1"])
    assert capsys.readouterr().err == "error: --temp must be between 0 and 1000, got -1.0.\n"
    assert str(RequestError("--temp")) == "temp."  # the command line is over


def test_representations_are_short(tiny):
    model, tokenizer = tiny
    assert str(model) == "OpenELM(6 layers, 4.1M parameters, float32, 8-bit affine)"
    assert repr(OpenELM(ModelConfig.from_name("1.1b"), initialize=False)) == (
        "OpenELM(1.1B, 28 layers, 1,079.9M parameters, float32)"
    )
    assert "TransformerLayer" in str(model.transformer)  # the modules, as MLX shows them
    assert repr(tokenizer) == "Tokenizer(2,048 tokens, begins with <s> 1, ends with </s> 2)"
    last = list(stream_generate(model, tokenizer, "To be", max_tokens=2))[-1]
    assert re.fullmatch(r"Piece\('.*', token=\d+, logprob=-\d+\.\d{3}, finish_reason='length'\)", repr(last))
    assert repr(FineTuneOptions(train=True, iters=5)) == "FineTuneOptions(iters=5, train=True)"
    assert repr(QuantizeOptions()) == "QuantizeOptions()"


@pytest.mark.parametrize("progress", [True, False, None])
def test_finetune_shows_progress_unless_turned_off(progress, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"text": "To be, or not to be."}\n' * 4)
    finetune("tiny", FineTuneOptions(train=True, data="data.jsonl", iters=1, batch_size=2), progress=progress)
    assert ("Trainable parameters" in capfd.readouterr().err) == (progress is True)


def test_a_job_shows_what_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    convert("tiny", tmp_path / "shown", dequantize=True)
    assert re.match(r"Writing: .*B of .*MB\n", capsys.readouterr().err)
    packed = quantize(tmp_path / "shown", tmp_path / "packed", QuantizeOptions(q_bits=4))
    assert packed.path is not None and "Writing: " in capsys.readouterr().err
    for progress in (None, False):
        convert("tiny", tmp_path / "silent", dequantize=True, overwrite=True, progress=progress)
    assert capsys.readouterr().err == ""
    counts: list[tuple[int, int]] = []
    convert("tiny", tmp_path / "counted", progress=lambda done, total: counts.append((done, total)))
    assert counts[-1][0] == counts[-1][1] > 0
