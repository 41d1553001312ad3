"""Continuing a CoreNet run from `training_checkpoint_*.pt`: a file in its layout that torch.optim.AdamW wrote.

No original was tried: they are gigabytes large. The layout is that of CoreNet's `get_training_state` and
`parameter_list`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.formats import corenet_training
from mlx_openelm.training.pretrain import pretrain
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import read
from mlx_openelm.training.run.preparing import Loading
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import numpy as np
import pytest
from pretraining_runs import options, write_folder
from quantization_models import tiny_config, tiny_model
from training_runs import Notes

torch = pytest.importorskip("torch")

CONFIG = tiny_config(vocab_size=2176)  # padded: the tokenizer has 2048
YAML = """
model:
  language_modeling:
    general_gpt:
      model_name: none
      vocab_size: 2176
      padding_index: 2048
      num_transformer_layers: 2
      model_dim: 64
      head_dim: 16
      num_query_heads: [2, 4]
      num_kv_heads: [1, 2]
      ffn_multipliers: [1.5, 2.0]
      ffn_dim_divisor: 32
      normalize_qk_projections: true
      share_input_output_layers: true
"""


def corenet_order(config) -> list[str]:
    """The parameters in the order of CoreNet's modules, by its names."""
    names = ["token_embeddings.weight"]
    for layer in range(config.num_transformer_layers):
        inner = ("attn.qkv_proj", "attn.q_norm", "attn.k_norm", "attn.out_proj", "ffn.proj_1", "ffn.proj_2",
                 "ffn_norm", "attn_norm")  # fmt: skip
        names += [f"layers.{layer}.{name}.weight" for name in inner]
    return [*names, "norm.weight"]


def gradient(parameter, step: int):
    generator = torch.Generator().manual_seed(parameter.numel() * 100 + step)
    return torch.randn(parameter.shape, generator=generator) * 1e-2


def make_run(steps: int = 3):
    """A model's parameters after some of AdamW's steps, and the optimizer."""
    model = tiny_model(seed=1, vocab_size=2176)
    from mlx.utils import tree_flatten

    values = {name.removeprefix("transformer."): np.array(value) for name, value in tree_flatten(model.parameters())}
    parameters = {name: torch.nn.Parameter(torch.tensor(values[name])) for name in corenet_order(CONFIG)}
    groups = [{"params": [p for p in parameters.values() if p.ndim != 1], "weight_decay": 0.1},
              {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for step in range(steps):
        advance(parameters, optimizer, step)
    return parameters, optimizer


def advance(parameters, optimizer, step: int) -> None:
    for parameter in parameters.values():
        parameter.grad = gradient(parameter, step)
    optimizer.step()


def save(path: Path, parameters, optimizer, iterations: int = 6, **changes) -> Path:
    """As `corenet.utils.checkpoint_utils.save_checkpoint`."""
    state = {
        "iterations": iterations,
        "epoch": 0,
        "model_state_dict": {name: parameter.detach() for name, parameter in parameters.items()},
        "optim_state_dict": optimizer.state_dict(),
        "best_metric": float("inf"),
        "is_interval_ckpt": True,
        "gradient_scaler_state_dict": {},
    }
    torch.save(state | changes, path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    write_folder(tmp_path)
    (tmp_path / "model.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_openelm.training.pretrain.measured_peak", lambda dtype: 1e12)
    return tmp_path


LOADING = Loading(tokenizer="tokenizer", config_yaml="model.yaml")
ADAMW = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def test_the_next_updates_are_those_of_pytorch(here):
    """Weights, moments and bias correction: three steps in PyTorch, then three here or there."""
    parameters, optimizer = make_run()
    save(here / "training_checkpoint_epoch_0_iter_6.pt", parameters, optimizer)
    training = corenet_training.read(here / "training_checkpoint_epoch_0_iter_6.pt")
    assert (training.iteration, training.updates) == (7, 3)
    model = tiny_model(vocab_size=2176)
    weights = {f"transformer.{name}": mx.array(p.detach().numpy()) for name, p in parameters.items()}
    model.load_weights(list(weights.items()))
    ours = make_optimizer(options(**ADAMW, learning_rate=1e-3))
    from mlx.utils import tree_unflatten

    tree = tree_unflatten(list(weights.items()))
    ours.init(tree)
    state = {"step": mx.array(training.updates, dtype=mx.uint64)}
    for name, (mean, square) in training.moments.items():
        state |= {f"{name}.m": mean.read(), f"{name}.v": square.read()}
    ours.state = tree_unflatten(list(state.items()))
    from mlx_openelm.training.step.optimizers import set_learning_rate

    from mlx.utils import tree_flatten

    for step in range(3, 6):
        advance(parameters, optimizer, step)
        gradients = {f"transformer.{n}": mx.array(gradient(p, step).numpy()) for n, p in parameters.items()}
        set_learning_rate(ours, mx.array(1e-3))
        tree = ours.apply_gradients(tree_unflatten(list(gradients.items())), tree)
    for name, value in tree_flatten(tree):
        expected = parameters[name.removeprefix("transformer.")].detach().numpy()
        assert np.abs(np.array(value) - expected).max() < 2e-7, name


def test_a_run_goes_on_at_its_iteration_and_resumes(here):
    parameters, optimizer = make_run()
    path = save(here / "training_checkpoint_last.pt", parameters, optimizer)
    notes = Notes()
    settings = ADAMW | {"iters": 9, "learning_rate": 1e-3, "warmup": 8, "save_every": 50, "steps_per_report": 1}
    done = pretrain(path, options(**settings), loading=LOADING, listener=notes)
    assert any("continues the CoreNet run" in line and "from iteration 7 on" in line for line in notes.lines)
    assert any("begins from its start" in line for line in notes.lines)
    rows = [row for row in read(here / "pretrained" / "metrics.jsonl") if "learning_rate" in row]
    assert [row["step"] for row in rows] == [8, 9] and done.training.steps == 9
    assert rows[0]["learning_rate"] == pytest.approx(1e-3 * 7 / 8)
    first = mx.load(str(here / "pretrained/checkpoints/0000007/optimizer.safetensors"))
    group, index = optimizer.state_dict()["param_groups"][0]["params"], 3  # layers.0.ffn.proj_1, the fourth matrix
    moment = optimizer.state_dict()["state"][group[index]]["exp_avg"].numpy()
    found = np.array(first["optimizer.transformer.layers.0.ffn.proj_1.weight.m"])
    assert moment.shape == (192, 64) and np.array_equal(found, moment)
    # Killed before its first checkpoint, a run continues from the state it took over.
    after = (here / "pretrained/model/model.safetensors").read_bytes()
    shutil.rmtree(here / "pretrained/checkpoints/0000009")
    pretrain(path, options(**settings, resume=True), loading=LOADING, listener=notes)
    assert (here / "pretrained/model/model.safetensors").read_bytes() == after


def test_a_prefix_of_all_names_is_removed(here):
    parameters, optimizer = make_run()
    plain = corenet_training.read(save(here / "a.pt", parameters, optimizer))
    weights = {f"module.{name}": parameter.detach() for name, parameter in parameters.items()}
    found = corenet_training.read(save(here / "b.pt", parameters, optimizer, model_state_dict=weights))
    assert list(found.moments) == list(plain.moments)


def test_names_of_a_sharded_run_serve_as_well(here):
    """FSDP's state names parameters, with the wrapper of recomputed layers in their path."""
    parameters, optimizer = make_run()
    state = optimizer.state_dict()
    names = [name for name, p in parameters.items() if p.ndim != 1] + [n for n, p in parameters.items() if p.ndim == 1]

    def wrapped(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], "_checkpoint_wrapped_module", *parts[2:]]) if parts[0] == "layers" else name

    named = {wrapped(name): state["state"][index] for index, name in enumerate(names)}
    groups = [group | {"params": [wrapped(names[i]) for i in group["params"]]} for group in state["param_groups"]]
    plain = corenet_training.read(save(here / "a.pt", parameters, optimizer))
    sharded = {"state": named, "param_groups": groups}
    found = corenet_training.read(save(here / "b.pt", parameters, optimizer, optim_state_dict=sharded))
    assert found.moments.keys() == plain.moments.keys()
    for name, pair in found.moments.items():
        for ours, theirs in zip(pair, plain.moments[name], strict=True):
            assert mx.array_equal(ours.read(), theirs.read()).item()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state["param_groups"].pop(), "it has 9 parameters, and the model 18"),
        (lambda state: state["state"][2].pop("exp_avg_sq"), "only AdamW's checkpoints"),
        (lambda state: state["state"][2].update(exp_avg=torch.zeros(3)), "have another shape"),
        (lambda state: state["state"][0].update(step=torch.tensor(0.5)), "its step is 0.5"),
        (lambda state: state.pop("state"), "it has no state"),
        (lambda state: state.update(param_groups=[]), "no groups of parameters"),
    ],
)
def test_states_that_do_not_fit_are_refused(here, spoil, message):
    parameters, optimizer = make_run(1)
    state = optimizer.state_dict()
    spoil(state)
    path = save(here / "training_checkpoint_x.pt", parameters, optimizer, optim_state_dict=state)
    with pytest.raises(RequestError, match=message):
        corenet_training.read(path)
    with pytest.raises(RequestError):
        pretrain(path, options(**ADAMW), loading=LOADING, listener=Listener())
    assert not (here / "pretrained" / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "state of one AdamW"),
        (ADAMW | {"embedding_learning_rate": 1e-3}, "no embedding_learning_rate"),
        (ADAMW | {"iters": 7}, "7 iterations behind it; iters must be more"),
    ],
)
def test_requests_that_do_not_fit_the_run_are_refused(here, changes, message):
    path = save(here / "training_checkpoint_last.pt", *make_run(1))
    with pytest.raises(RequestError, match=message):
        pretrain(path, options(**changes), loading=LOADING, listener=Listener())
    assert not (here / "pretrained" / "run.json").exists()


def test_the_updater_takes_a_moving_average_too(here):
    """With --ema-decay the state is one level deeper."""
    path = save(here / "training_checkpoint_last.pt", *make_run())
    done = pretrain(path, options(**ADAMW, iters=9, ema_decay=0.9), loading=LOADING, listener=Listener())
    assert "model-ema" in done.models


def test_the_updater_names_its_state_as_continuing_expects():
    updater = Updater(tiny_model(), make_optimizer(options(**ADAMW)))
    assert "optimizer.transformer.layers.0.ffn.proj_1.weight.m" in updater.state()
    assert "optimizer.step" in updater.state()
