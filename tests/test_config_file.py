"""Configuration files: our names, mlx-lm's nested ones, and CoreNet's recipes under `lora/configs`."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm import errors
from mlx_openelm.errors import RequestError
from mlx_openelm.formats.adapter import TARGET_MODULES
from mlx_openelm.training import config_file
from mlx_openelm.training import options as training_options
from mlx_openelm.training.config_file import merge, read, to_dict, with_place
from mlx_openelm.training.mlx_lm_config import KEYS
from mlx_openelm.training.options import FineTuneOptions, TrainOptions
from mlx_openelm.training.options.grpo import GRPOOptions
from mlx_openelm.training.options.preference import PreferenceOptions
from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.options.values import field_types

import pytest

yaml = pytest.importorskip("yaml")

CONFIGS = Path(__file__).parent.parent / "lora" / "configs"
# The configuration in mlx-lm's documentation (LORA.md, examples/lora_config.yaml), with nothing left out.
MLX_LM = """
model: "270m"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adam: {}
  adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}
data: "my_data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
report_to: null
project_name: null
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 1
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["attn.qkv_proj", "ffn.proj_2"]
  rank: 16
  scale: 10.0
  dropout: 0.05
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [2e-5, 1000, 1e-7]
trust_remote_code: false
clear_cache_threshold: 0
hf_dataset: null
config: null
mask_prompt: false
"""


def of(text: str, tmp_path: Path, **flags: Any) -> tuple[FineTuneOptions, dict[str, Any]]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return merge(FineTuneOptions, read(path), flags)[:2]


def refusal(text: str, tmp_path: Path, **flags: Any) -> str:
    with pytest.raises(RequestError) as caught:
        of(text, tmp_path, **flags)
    return str(caught.value)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    options, rest = of("model: 270m\nrank: 4\niters: 7\n", tmp_path, rank=2, model=None, batch_size=None)
    assert (options.rank, options.iters, options.batch_size) == (2, 7, 4)
    assert rest == {"model": "270m"}
    assert of("model: 270m\n", tmp_path, model="tiny")[1] == {"model": "tiny"}
    assert of("", tmp_path) == (FineTuneOptions(), {})


def test_numbers_in_every_common_spelling(tmp_path: Path) -> None:
    numbers = {"1e-5": 1e-5, "1E5": 1e5, "+1.5e3": 1500.0, ".5e-3": 5e-4, "3.e-4": 3e-4, "1e+2": 100.0, "2": 2.0}
    for text, number in numbers.items():
        (tmp_path / "n.yaml").write_text(f"learning_rate: {text}\nnames: [e5, 1e, '1e-5']\n")
        found = read(tmp_path / "n.yaml")
        assert found == {"learning_rate": number, "names": ["e5", "1e", "1e-5"]}
    assert of("iters: 1e3", tmp_path)[0].iters == 1000


def test_sample_prompt_is_another_spelling(tmp_path: Path) -> None:
    assert of("sample_prompt: the king", tmp_path)[0].sample_prompts == ("the king",)
    assert of("sample_prompt: [a, b]", tmp_path)[0].sample_prompts == ("a", "b")
    with pytest.raises(RequestError, match="both sample_prompt and sample_prompts"):
        of("sample_prompt: a\nsample_prompts: [b]", tmp_path)


def test_an_mlx_lm_file(tmp_path: Path) -> None:
    options, rest = of(MLX_LM, tmp_path)
    options.check()
    assert rest == {"model": "270m"}
    assert options == FineTuneOptions(
        train=True,
        data="my_data",
        num_layers=16,
        test_batches=100,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.98,
        eps=1e-6,
        weight_decay=0.05,
        rank=16,
        scale=10.0,
        dropout=0.05,
        target_modules=("qkv_proj", "proj_2"),
        lr_schedule="cosine",
        learning_rate=2e-5,
        decay_steps=1000,
        min_learning_rate=1e-7,
        warmup=100,
        warmup_init=1e-7,
    )


def test_mlx_lm_keys_without_effect_are_accepted(tmp_path: Path) -> None:
    text = "use_dora: false\nprompt_feature: prompt\ncompletion_feature: completion\ntext_feature: text\n"
    assert of(text + "chat_feature: messages\nlora_layers: null\n", tmp_path) == (FineTuneOptions(), {})


def test_the_docs_list_every_unsupported_key() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "coming-from-mlx-lm.md").read_text()
    section = docs[docs.index("## What is not supported") :]
    assert [key for key in config_file._NOT_OFFERED if f"`{key}`" not in section] == []


def test_every_default_of_mlx_lm_is_accepted(tmp_path: Path) -> None:
    """A file with all of mlx-lm's defaults, as it saves them in `adapter_config.json`."""
    defaults = pytest.importorskip("mlx_lm.lora").CONFIG_DEFAULTS
    options, rest = of(json.dumps(defaults | {"train": True}), tmp_path)
    options.check()
    assert rest == {"model": defaults["model"]}
    expected = FineTuneOptions(train=True, data=defaults["data"], num_layers=16, rank=8, scale=20.0)
    assert options == expected


def test_flags_override_nested_keys(tmp_path: Path) -> None:
    options, _ = of(MLX_LM, tmp_path, rank=3, learning_rate=1e-4, alpha=6.0, target_modules=["proj_1"], eps=1e-4)
    assert (options.rank, options.learning_rate, options.eps) == (3, 1e-4, 1e-4)
    assert (options.alpha, options.scale, options.lora_scale) == (6.0, None, 2.0)
    assert options.target_modules == ("proj_1",)


def test_keys_that_a_flag_makes_meaningless_are_dropped(tmp_path: Path) -> None:
    def checked(text: str, **flags: Any) -> FineTuneOptions:
        options, _ = of(text, tmp_path, train=True, data="d", **flags)
        options.check()
        return options

    flat = "optimizer: adamw\nbeta2: 0.95\nweight_decay: 0.1\neps: 1e-6\n"
    assert checked(flat, optimizer="sgd") == replace(checked(""), optimizer="sgd")
    assert checked(flat, optimizer="adamw").beta2 == 0.95
    assert checked("beta2: 0.95", optimizer="adamw").beta2 == 0.95
    # Of the nested keys, those of the given optimizer apply.
    assert checked(MLX_LM, optimizer="adam") == replace(
        checked(MLX_LM), optimizer="adam", beta1=None, beta2=None, eps=None, weight_decay=None
    )
    constant = checked(MLX_LM, lr_schedule="constant")
    assert (constant.min_learning_rate, constant.decay_steps, constant.learning_rate) == (0.0, None, 2e-5)
    assert checked(MLX_LM, warmup=0).warmup_init == 0.0
    full = checked(MLX_LM, fine_tune_type="full")
    assert (full.scale, full.target_modules, full.dropout) == (None, None, 0.0)
    assert checked("fine_tune_type: full\nlora_parameters: {scale: 5.0}").scale is None
    assert checked("fine_tune_type: full\nlora_parameters: {scale: 5.0}", fine_tune_type="lora").scale == 5.0
    assert checked("iters: 5", epochs=2.0).iters == 1000
    assert checked("epochs: 5", iters=3).epochs is None
    assert checked("alpha: 5\nuse_rslora: true", scale=3.0).lora_scale == 3.0
    assert checked("resume_adapter_file: a", resume=True).resume_adapter_file is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("{name: cosine_decay, arguments: [1e-3, 9]}", ("cosine", 1e-3, 9, 0.0, 0)),
        ("{name: linear_schedule, arguments: [1e-3, 1e-4, 9]}", ("linear", 1e-3, 9, 1e-4, 0)),
        ("{name: cosine_decay, arguments: [1e-3, 9, 0], warmup: 3}", ("cosine", 1e-3, 9, 0.0, 3)),
        ("{name: cosine_decay, arguments: [1e-3, 9], warmup: 0, warmup_init: 1e-7}", ("cosine", 1e-3, 9, 0.0, 0)),
        ("cosine", ("cosine", 1e-5, None, 0.0, 0)),
    ],
)
def test_schedules(schedule: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    found, _ = of(f"lr_schedule: {schedule}", tmp_path, train=True, data="d")
    found.check()
    assert (
        found.lr_schedule,
        found.learning_rate,
        found.decay_steps,
        found.min_learning_rate,
        found.warmup,
    ) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leaning_rate: 1", "has an unknown key 'leaning_rate'; did you mean learning_rate or min_learning_rate?"),
        ("batch-size: 1", "has an unknown key 'batch-size'; did you mean batch_size?"),
        ("zzz: 1", "has an unknown key 'zzz'; see `mlx-openelm lora --help`"),
        ("5: 1", "has an unknown key 5;"),
        ("rank: many", "rank must be a whole number, got 'many'."),
        ("rank: 2.5", "rank must be a whole number, got 2.5."),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'."),
        ("train: maybe", "train must be true or false, got 'maybe'."),
        ("target_modules: 5", "target_modules must be a list of texts, got 5."),
        ("revision: 1234567", "revision must be text, got 1234567; put it in quotes."),
        ("model: [a]", "model must be text, got ['a']."),
        ("alpha: 1\nscale: 2", "has both alpha and scale"),
        ("alpha: 1\nlora_parameters: {scale: 2}", "has both alpha and scale"),
        ("iters: 1\nepochs: 2", "has both iters and epochs"),
        ("hf_dataset: {path: x}", "has hf_dataset, which is not offered; name the data set in data."),
        ("trust_remote_code: true", "has trust_remote_code, which is not offered"),
        ("clear_cache_threshold: 5", "has clear_cache_threshold, which is not offered"),
        ("config: other.yaml", "has config, which is not offered"),
        ("prompt_feature: question", "has prompt_feature, which is not offered; name the column prompt."),
        ("completion_feature: answer", "has completion_feature, which is not offered; name the column"),
        ("text_feature: body", "has text_feature, which is not offered; name the column text."),
        ("chat_feature: turns", "has chat_feature, which is not offered; name the column messages."),
        ("lora_layers: 16", "has lora_layers, which is not offered; it is called num_layers."),
        ("use_dora: true", "has use_dora, which is not offered; write fine_tune_type: dora."),
        ("adapter_file: adapters.npz", "has adapter_file, which is not offered; write adapter_path"),
        ("wandb: my_project", "has wandb, which is not offered; write report_to: wandb"),
        ("lora_parameters: 5", "lora_parameters must hold keys with values, got 5."),
        ("lora_parameters: {r: 5}", "lora_parameters has an unknown key 'r'; choose from rank, scale,"),
        ("lora_parameters: {rank: x}", "rank must be a whole number, got 'x'."),
        (
            "lora_parameters: {keys: [self_attn.q_proj]}",
            "lora_parameters.keys has 'self_attn.q_proj', which OpenELM does not have; choose from token_"
            "embeddings, qkv_proj,",
        ),
        ("lora_parameters: {keys: [[a]]}", "lora_parameters.keys has ['a'], which OpenELM does not have;"),
        ("lr_schedule: {name: [a]}", "lr_schedule.name must be cosine_decay or linear_schedule, got ['a']."),
        ("optimizer: [adam]\noptimizer_config: {adam: {}}", "optimizer must be text, got ['adam']."),
        (f"learning_rate: 1{'0' * 400}", "learning_rate must be a number, got 1000"),
        (f"seed: 1{'0' * 400}", "seed must be a whole number below 2**64, got 1000"),
        ("lora_parameters: {keys: attn}", "lora_parameters.keys must be a list, got 'attn'."),
        (
            "lr_schedule: {name: step_decay, arguments: [1, 2]}",
            "lr_schedule.name must be cosine_decay or linear_schedule, got 'step_decay'.",
        ),
        ("lr_schedule: {name: cosine_decay}", "lr_schedule.arguments must be the list learning_rate, decay_steps,"),
        ("lr_schedule: {name: linear_schedule, arguments: [1, 2]}", "lr_schedule.arguments must be the list"),
        ("optimizer_config: {adam: {betas: 0.9}}", "optimizer_config.adam.betas must be a list of two numbers"),
        ("optimizer_config: {adam: {amsgrad: true}}", "optimizer_config.adam has amsgrad, which is not offered"),
        ("optimizer_config: {adam: 3}", "optimizer_config.adam must hold keys with values, got 3."),
        (
            "optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}",
            "optimizer_config.sgd.nesterov must be False, other values are not offered; got True.",
        ),
        ("rank: 1\nrank: 2", "is not valid YAML: duplicate key rank"),
        ("lora_parameters: {rank: 1, rank: 2}", "is not valid YAML: duplicate key rank"),
        ("rank: [", "is not valid YAML:"),
        ("- rank", "must hold keys with values"),
        ("rank: !!python/object/apply:os.getcwd []", "is not valid YAML:"),
    ],
)
def test_invalid_settings_are_named(text: str, message: str, tmp_path: Path) -> None:
    found = refusal(text, tmp_path)
    assert message in found
    assert "\n" not in found


# What YAML can hold where something else is expected.
STRANGE = [
    ["a"],
    [["a"]],
    [{"a": 1}],
    [None],
    [10**400],
    {"a": 1},
    {},
    None,
    True,
    10**400,
    1 << 63,
    math.nan,
    1.5,
    "text",
    "",
]
# A file with such a value in a nested place.
NESTED: list[Callable[[Any], dict[str, Any]]] = [
    *((lambda value, key=key: {"lora_parameters": {key: value}}) for key in ("rank", "scale", "alpha", "keys")),
    lambda value: {"lr_schedule": {"name": value, "arguments": [1e-3, 9]}},
    lambda value: {"lr_schedule": {"name": "cosine_decay", "arguments": value}},
    lambda value: {"lr_schedule": {"name": "linear_schedule", "arguments": [value, value, value]}},
    lambda value: {"lr_schedule": {"name": "cosine_decay", "arguments": [1, 9], "warmup": 1, "warmup_init": value}},
    lambda value: {"optimizer": value, "optimizer_config": {"adam": {}}},
    lambda value: {"optimizer": "sgd", "optimizer_config": {"sgd": {"dampening": value}}},
    lambda value: {"optimizer_config": {"adam": value}},
    *((lambda value, key=key: {"optimizer_config": {"adam": {key: value}}}) for key in ("betas", "eps")),
    lambda value: {"optimizer_config": {"adam": {"betas": [value, value]}}},
    lambda value: {"fine_tune_type": value, "lora_parameters": {"rank": 2}},
    lambda value: {"data": [value]},
    lambda value: {"data": {"path": "a", "weight": value}},
    lambda value: {"data": {"path": value, "text_key": value}},
]


@pytest.mark.parametrize("options", [FineTuneOptions, PretrainOptions, PreferenceOptions, GRPOOptions])
def test_a_value_of_any_type_is_read_or_refused(options: type[TrainOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (config_file, training_options):
        monkeypatch.setattr(module, "field_types", functools.cache(field_types))
    keys = (*field_types(options), *config_file.MODEL_KEYS, *config_file._NOT_OFFERED, *KEYS, "sample_prompt")
    flat: list[Callable[[Any], dict[str, Any]]] = [lambda value, key=key: {key: value} for key in keys]
    for place, value in itertools.product([*flat, *NESTED], STRANGE):
        try:
            merge(options, place(value), {}).options.check()
        except RequestError as error:
            assert "\n" not in str(error)


def test_flags_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    assert refusal("", tmp_path, alpha=1.0, scale=2.0).startswith("alpha and scale set the same thing")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none.yaml does not exist."):
        read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="bytes.yaml is not UTF-8"):
        read(tmp_path / "bytes.yaml")


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    options, _ = of("optimizer_config:\n  sgd: &a {}\n  adam:\n    <<: *a\n    eps: 1e-6\n", tmp_path)
    assert options.eps == 1e-6


def test_modules_may_be_written_with_commas(tmp_path: Path) -> None:
    assert of("target_modules: qkv_proj, proj_1", tmp_path)[0].target_modules == ("qkv_proj", "proj_1")


def test_other_kinds_of_training_have_their_own_options(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rank: 5\n")
    with pytest.raises(RequestError, match="unknown key 'rank'"):
        merge(TrainOptions, read(tmp_path / "c.yaml"), {}, place="c.yaml")
    with pytest.raises(RequestError, match="unknown key 'lora_parameters'"):
        merge(PretrainOptions, {"lora_parameters": {"rank": 5}}, {})


@pytest.mark.parametrize("flags", [{}, {"epochs": 2.0}, {"iters": 5, "target_modules": ["proj_1"]}])
def test_options_as_json_give_the_same_options(flags: dict[str, Any], tmp_path: Path) -> None:
    options, _ = of(MLX_LM, tmp_path, sample_prompts=["a, b", "c"], **flags)
    written = json.loads(json.dumps(to_dict(options)))
    assert merge(FineTuneOptions, written, {})[:2] == (options, {})
    assert of(yaml.safe_dump(written), tmp_path)[0] == options


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("size", ["270m", "450m", "1.1b", "3b"])
def test_corenets_recipes(size: str, kind: str) -> None:
    """The numbers of CoreNet's `openelm_lora_*.yaml`; its DoRA recipes differ only in `use_dora`."""
    flags = {"train": True, "data": "d"} | ({"fine_tune_type": "dora"} if kind == "dora" else {})
    options, rest, _ = merge(FineTuneOptions, read(CONFIGS / f"{size}.yaml"), flags)
    options.check()
    assert rest == {"model": size}
    assert options == FineTuneOptions(
        train=True,
        data="d",
        fine_tune_type=kind,
        target_modules=TARGET_MODULES,
        num_layers=-1,
        rank=32,
        alpha=32.0,
        dropout=0.1,
        adapter_format="peft",
        mask_prompt=False,
        max_seq_length=2048,
        z_loss=1e-4,
        batch_size=8,
        grad_accumulation_steps=2,
        iters=4375,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_schedule="cosine",
        learning_rate=3e-4,
        min_learning_rate=3e-5,
        warmup=1000,
        warmup_init=1e-6,
        grad_checkpoint=size != "270m",
    )
    assert options.lora_scale == 1.0


def test_an_error_says_which_settings_came_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "names_flags", True)  # as on the command line
    (tmp_path / "c.yaml").write_text("rank: 0\ndata: nowhere\nlearning_rate: 1e-3\nwarmup: 5\n")
    merged = merge(FineTuneOptions, read(tmp_path / "c.yaml"), {"learning_rate": 1e-4, "model": "m"})
    assert merged.from_file == {"rank": 0, "data": "nowhere", "warmup": 5}

    def told(message: str) -> str:
        return str(with_place(RequestError(message), merged.from_file, "c.yaml"))

    assert told("--rank must be 1 or more, got 0.") == "--rank must be 1 or more, got 0. rank is set in c.yaml."
    assert told("There is no folder or file nowhere.").endswith(" data is set in c.yaml.")
    assert told("--rank and --warmup.").endswith(" rank and warmup are set in c.yaml.")
    for other in ("--learning-rate is 0.", "--warmup-init is 0.", "no/nowhere is a file.", "rank 0."):
        assert told(other) == other


def test_an_error_about_the_model_does_not_blame_a_setting_of_the_same_value() -> None:
    from_file = {"model": {"name": "tiny", "head_dim": 7}, "tokenizer": "tiny"}

    def told(message: str) -> str:
        return str(with_place(RequestError(message), from_file, "c.yaml"))

    assert told("The model's name must be one of 3b, tiny, got 'tiny'.").endswith(". model.name is set in c.yaml.")
    assert told("head_dim must be even, got 7.").endswith(". model.head_dim is set in c.yaml.")
    assert told("No tokenizer at tiny.").endswith(". tokenizer is set in c.yaml.")
    assert told("Data has no name.") == "Data has no name."
