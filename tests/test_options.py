"""The options of a run: every invalid value is refused, by its flag."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.training.options import FineTuneOptions, TrainOptions
from mlx_openelm.training.options.values import conform, field_types

import pytest

GOOD = FineTuneOptions(train=True, data="my_data")


def refusal(**values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        replace(GOOD, **values).check()
    return str(caught.value)


def test_the_defaults_are_valid_and_equal_mlx_lms() -> None:
    GOOD.check()
    TrainOptions().check()
    mlx_lm = pytest.importorskip("mlx_lm.lora").CONFIG_DEFAULTS
    # Two differ on purpose: all layers, and a named schedule instead of None.
    ours_alone = {"num_layers": -1, "lr_schedule": "constant", "data": None}
    for field in fields(FineTuneOptions):
        if field.name in mlx_lm and field.name not in ours_alone:
            assert field.default == mlx_lm[field.name], field.name
    assert {name: getattr(FineTuneOptions(), name) for name in ours_alone} == ours_alone
    assert mlx_lm["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": FineTuneOptions().lora_scale}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more, got 0."),
        ({"rank": 2.5}, "rank must be a whole number, got 2.5."),
        ({"rank": "8"}, "rank must be a whole number, got '8'."),
        ({"rank": True}, "rank must be a whole number, got True."),
        ({"iters": math.inf}, "iters must be a whole number, got inf."),
        ({"iters": None}, "iters must be a whole number, got None."),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0."),
        ({"grad_accumulation_steps": 0}, "grad_accumulation_steps must be 1 or more, got 0."),
        ({"max_seq_length": 1}, "max_seq_length must be 2 or more, got 1."),
        ({"seed": -1}, "seed must be 0 or more, got -1."),
        ({"seed": 1 << 64}, "seed must be a whole number below 2**64, got 18446744073709551616."),
        ({"seed": 1e30}, "seed must be a whole number below 2**64, got 1e+30."),
        ({"epochs": 0}, "epochs must be more than 0, got 0.0."),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0, got 0.0."),
        ({"learning_rate": math.nan}, "learning_rate must be a number, got nan."),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number, got '1e-5'."),
        ({"weight_decay": -0.1, "optimizer": "adamw"}, "weight_decay must be 0 or more, got -0.1."),
        ({"beta2": 1.0}, "beta2 must be less than 1, got 1.0."),
        ({"eps": 0}, "eps must be more than 0, got 0.0."),
        ({"max_grad_norm": 0}, "max_grad_norm must be more than 0, got 0.0."),
        ({"z_loss": -1}, "z_loss must be 0 or more, got -1.0."),
        ({"label_smoothing": 1}, "label_smoothing must be less than 1, got 1.0."),
        ({"dropout": 1}, "dropout must be less than 1, got 1.0."),
        ({"alpha": 0}, "alpha must be more than 0, got 0.0."),
        ({"scale": -2}, "scale must be more than 0, got -2.0."),
        ({"valid_fraction": 1}, "valid_fraction must be less than 1, got 1.0."),
        ({"val_batches": -2}, "val_batches must be -1 or more, got -2."),
        ({"test_batches": 0}, "test_batches must be 1 or more, or -1 for all, got 0."),
        ({"num_layers": 0}, "num_layers must be 1 or more, or -1 for all, got 0."),
        ({"early_stop": 0}, "early_stop must be 1 or more, got 0."),
        ({"keep_last": 0}, "keep_last must be 1 or more, got 0."),
        ({"mask_prompt": "yes"}, "mask_prompt must be true or false, got 'yes'."),
        ({"data": 5}, "data must be text, got 5."),
        ({"target_modules": ["qkv_proj", 3]}, "target_modules must be a list of texts, got ['qkv_proj', 3]."),
        (
            {"optimizer": "adamW"},
            "optimizer must be adam, adamw, sgd, lion, adafactor or muon, got 'adamW'.",
        ),
        ({"lr_schedule": "cosine_decay"}, "lr_schedule must be constant, cosine or linear, got 'cosine_decay'."),
        ({"fine_tune_type": "qlora"}, "fine_tune_type must be lora, dora or full, got 'qlora'."),
        ({"long_examples": "skip"}, "long_examples must be truncate or refuse, got 'skip'."),
        ({"adapter_format": "gguf"}, "adapter_format must be mlx or peft, got 'gguf'."),
        (
            {"target_modules": ("q_proj",)},
            "target_modules must be among token_embeddings, qkv_proj, out_proj, proj_1, proj_2, not 'q_proj'; "
            "did you mean qkv_proj?",
        ),
        (
            {"target_modules": ("lm_head",)},
            "target_modules must be among token_embeddings, qkv_proj, out_proj, proj_1, proj_2, not 'lm_head'.",
        ),
        ({"report_to": "swanlab"}, "report_to knows tensorboard and wandb, not 'swanlab'."),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    assert refusal(**values) == message


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"train": False}, ("train", "test")),
        ({"data": None}, ("data",)),
        ({"adapter_path": ""}, ("adapter_path",)),
        ({"alpha": 16, "scale": 2}, ("alpha", "scale")),
        ({"use_rslora": True}, ("use_rslora", "alpha")),
        ({"use_rslora": True, "scale": 2}, ("use_rslora", "alpha")),
        ({"target_modules": ()}, ("target_modules",)),
        ({"fine_tune_type": "full", "alpha": 16}, ("alpha", "full")),
        ({"fine_tune_type": "full", "scale": 16}, ("scale", "full")),
        ({"fine_tune_type": "full", "dropout": 0.1}, ("dropout", "full")),
        ({"fine_tune_type": "full", "adapter_format": "peft"}, ("adapter_format", "full")),
        ({"resume": True, "resume_adapter_file": "a.safetensors"}, ("resume ", "resume_adapter_file")),
        ({"resume": True, "train": False, "test": True}, ("resume", "train")),
        ({"resume_adapter_file": "a", "train": False, "test": True}, ("resume_adapter_file", "train")),
        ({"early_stop": 3, "val_batches": 0}, ("early_stop", "val_batches")),
        ({"keep_every": 250}, ("keep_every", "save_every")),
        ({"optimizer": "adam", "weight_decay": 0.1}, ("adam", "weight_decay", "adamw")),
        ({"optimizer": "adamw", "momentum": 0.9}, ("adamw", "momentum", "sgd or muon")),
        ({"optimizer": "sgd", "beta2": 0.9}, ("sgd", "beta2")),
        ({"optimizer": "lion", "eps": 1e-6}, ("lion", "eps")),
        ({"optimizer": "lion", "bias_correction": False}, ("bias_correction=False", "adam, adamw or muon")),
        ({"min_learning_rate": 1e-4, "lr_schedule": "cosine"}, ("min_learning_rate", "learning_rate")),
        ({"min_learning_rate": 1e-6}, ("min_learning_rate", "lr_schedule")),
        ({"project_name": "mine", "report_to": "tensorboard"}, ("project_name", "report_to wandb")),
        ({"decay_steps": 10}, ("decay_steps", "lr_schedule")),
        ({"warmup_init": 1e-4, "warmup": 5}, ("warmup_init", "learning_rate")),
        ({"warmup_init": 1e-6}, ("warmup_init", "warmup")),
        ({"warmup": 1000}, ("warmup", "iters (1000)")),
    ],
)
def test_contradictory_options_are_refused(values: dict[str, Any], flags: tuple[str, ...]) -> None:
    message = refusal(**values)
    assert all(flag in message for flag in flags), message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"train": False, "test": True, "adapter_path": ""},
        {"optimizer": "muon", "momentum": 0.9, "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.9, "eps": 1e-10},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"lr_schedule": "linear", "min_learning_rate": 1e-6, "decay_steps": 7, "warmup": 10, "warmup_init": 1e-7},
        {"warmup": 1000, "epochs": 2.0},
        {"fine_tune_type": "full"},
        {"val_batches": -1, "test_batches": -1, "num_layers": 2, "keep_every": 300},
        {"alpha": 16, "use_rslora": True, "target_modules": ("token_embeddings", "proj_2"), "dropout": 0.1},
        {"resume_adapter_file": "adapters/adapters.safetensors"},
    ],
)
def test_valid_options_pass(values: dict[str, Any]) -> None:
    replace(GOOD, **values).check()


def test_numbers_and_lists_may_be_spelled_differently() -> None:
    options = FineTuneOptions(iters=1e3, learning_rate=1, target_modules=["qkv_proj"])  # type: ignore[arg-type]
    assert (options.iters, type(options.iters)) == (1000, int)
    assert (options.learning_rate, type(options.learning_rate)) == (1.0, float)
    assert options.target_modules == ("qkv_proj",)


def test_the_scale_follows_from_scale_alpha_or_the_default() -> None:
    assert FineTuneOptions().lora_scale == 20.0
    assert FineTuneOptions(rank=4).lora_scale == 20.0
    assert FineTuneOptions(rank=4, scale=3).lora_scale == 3.0
    assert FineTuneOptions(rank=16, alpha=32).lora_scale == 2.0
    assert FineTuneOptions(rank=16, alpha=32, use_rslora=True).lora_scale == 8.0


def test_every_type_of_a_field_can_be_read() -> None:
    for name, kind in field_types(FineTuneOptions).items():
        assert conform(kind, getattr(FineTuneOptions(), name)) == getattr(FineTuneOptions(), name)
        with pytest.raises(ValueError):
            conform(kind, {"a": 1})
