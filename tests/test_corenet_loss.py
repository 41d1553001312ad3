"""CoreNet's loss, learning rates and first steps, against PyTorch's functions put together as CoreNet does."""

from __future__ import annotations

import math

from mlx_openelm.model import OpenELM
from mlx_openelm.training.data.batches import IGNORED, Batch
from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.recipes import RECIPES, find_recipe
from mlx_openelm.training.run.stream import DeviceStream
from mlx_openelm.training.step import schedule
from mlx_openelm.training.step.corenet_loss import CoreNetCrossEntropy
from mlx_openelm.training.step.initial_weights import initial_weights
from mlx_openelm.training.step.objectives import Forward
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import tiny_config, tiny_model

LENGTH = 24


def batch(lengths: list[int], seed: int) -> Batch:
    """Rows with so many learned tokens each, then padding."""
    draw = np.random.default_rng(seed)
    inputs, targets = draw.integers(3, 256, (len(lengths), LENGTH)), draw.integers(3, 256, (len(lengths), LENGTH))
    for row, length in enumerate(lengths):
        inputs[row, length:], targets[row, length:] = 0, IGNORED
    return Batch(mx.array(inputs), mx.array(targets), None, tuple(range(len(lengths))), sum(lengths), sum(lengths))


DEVICES = [batch([24, 7], 0), batch([11, 3], 1), batch([24, 24], 2)]


class Data:
    """The three devices' batches, in each step."""

    def step(self):
        from mlx_openelm.training.data.batches import Step

        tokens = sum(each.num_targets for each in DEVICES)
        return Step(0, 0, DEVICES, tokens, tokens, (0,))

    def state(self):
        return {}


def corenet_losses(logits, targets, eps: float = 1e-4):
    """`CrossEntropyLM._compute_loss`, from its formulas: total, cross-entropy and z-loss of one device."""
    torch = pytest.importorskip("torch")
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    likelihood = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
    valid = (targets != IGNORED).to(logits.dtype)
    z_loss = eps * ((logits * valid[:, None]).logsumexp(-1) ** 2).sum() / valid.sum()
    return likelihood + z_loss, likelihood, z_loss


def test_the_reported_figures_are_corenets_and_the_gradient_too():
    """The mean over devices of their own means, padding in the z-loss."""
    torch = pytest.importorskip("torch")
    model = tiny_model()
    step = DeviceStream(Data(), 0, num_processes=1).step(0, 0)
    objective = CoreNetCrossEntropy(1e-4)
    sums = [objective(Forward(model), objective.arrays(each)) for each in step.batches]
    expected = []
    for each in DEVICES:
        logits = torch.tensor(np.array(model(each.inputs)), dtype=torch.float64)
        expected.append(corenet_losses(logits, torch.tensor(np.array(each.targets)).long()))
    total, likelihood, z_loss = (float(np.mean([float(figures[i]) for figures in expected])) for i in range(3))
    share = 1 / step.num_targets
    assert share * sum(s.loss.item() for s in sums) == pytest.approx(likelihood, rel=1e-5)
    assert share * sum(s.metrics["total_loss"].item() for s in sums) == pytest.approx(total, rel=1e-5)
    assert share * sum(s.metrics["z_loss"].item() for s in sums) == pytest.approx(z_loss, rel=1e-3)
    # Padding raises the total by 1e-4 ln(V)^2 pads / valid, and is no part of what is minimized.
    padding = np.mean([(each.inputs.size - each.num_targets) / each.num_targets for each in DEVICES])
    minimized = share * sum(s.objective.item() for s in sums)
    assert total - minimized == pytest.approx(1e-4 * math.log(256) ** 2 * padding, rel=1e-3)


def test_three_steps_equal_pytorchs():
    """Gradients of the mean of devices' means, clipping, AdamW without decay of norms, the learning rates."""
    torch = pytest.importorskip("torch")
    options = PretrainOptions(optimizer="adamw", beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, learning_rate=5e-3,
                              warmup=2, warmup_init=1e-6, min_learning_rate=5e-4, decay_steps=9, max_grad_norm=0.5,
                              iters=3)  # fmt: skip
    config = tiny_config()
    model = OpenELM(config, initialize=False)
    model.load_weights(list(initial_weights(config, 0).items()))
    reference = {
        name: torch.tensor(np.array(value)).requires_grad_() for name, value in initial_weights(config, 0).items()
    }
    groups = [{"params": [p for p in reference.values() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in reference.values() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    updater = Updater(model, make_optimizer(options), objective=CoreNetCrossEntropy(1e-4), max_grad_norm=0.5)
    stream = DeviceStream(Data(), 0, num_processes=1)
    for number in range(3):
        rate = schedule.learning_rate(options, number, 3)
        step = stream.step(number, 0)
        update = updater.update(step.batches, step.num_targets, rate, number)
        adamw.zero_grad()
        totals = []
        for each in DEVICES:
            logits = torch_logits(torch, config, reference, torch.tensor(np.array(each.inputs)).long())
            total, _, _ = corenet_losses(logits, torch.tensor(np.array(each.targets)).long())
            (total / len(DEVICES)).backward()
            totals.append(total.item())
        norm = torch.nn.utils.clip_grad_norm_(list(reference.values()), 0.5)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        assert update.metrics["total_loss"].item() == pytest.approx(np.mean(totals), rel=2e-5)
        assert update.grad_norm.item() == pytest.approx(float(norm), rel=1e-4)
    for name, value in updater.state().items():
        if name.startswith("weights."):
            ours, theirs = np.array(value), reference[name.removeprefix("weights.")].detach().numpy()
            assert np.abs(ours - theirs).max() < 3e-5, name


def torch_logits(torch, config, weights, tokens):
    """OpenELM's forward pass [B, L, vocab] in PyTorch, from the paper's description."""

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x):
        half = config.head_dim // 2
        angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = weights["transformer.token_embeddings.weight"][tokens]
    for layer in range(config.num_transformer_layers):
        w = {n.split(f"layers.{layer}.")[1]: v for n, v in weights.items() if f"layers.{layer}." in n}
        heads, kv = config.num_query_heads[layer], config.num_kv_heads[layer]
        qkv = norm(x, w["attn_norm.weight"]) @ w["attn.qkv_proj.weight"].T
        qkv = qkv.unflatten(-1, (heads + 2 * kv, config.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([heads, kv, kv], dim=1)
        q, k = rotate(norm(q, w["attn.q_norm.weight"])), rotate(norm(k, w["attn.k_norm.weight"]))
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ w["attn.out_proj.weight"].T
        gate, up = (norm(x, w["ffn_norm.weight"]) @ w["ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w["ffn.proj_2.weight"].T
    return norm(x, weights["transformer.norm.weight"]) @ weights["transformer.token_embeddings.weight"].T


# The recipes.

# From the table of facts: maximum learning rate; minimum a tenth.
RATES = {"openelm-270m": 5.3e-3, "openelm-450m": 3.9e-3, "openelm-1.1b": 2.4e-3, "openelm-3b": 1.2e-3}


def recipe(name: str) -> PretrainOptions:
    from mlx_openelm.training import config_file

    values = config_file.read(find_recipe(name))
    model = values.pop("model")
    assert model == {"name": name.removeprefix("openelm-"), "vocab_size": 32128}
    made = config_file.merge(PretrainOptions, values, {"data": ("text",)}, model_keys=("tokenizer",)).options
    made.check()
    return made


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("openelm")])
def test_recipes_have_corenets_settings(name):
    options = recipe(name)
    assert options.batch_size * options.max_seq_length * options.grad_accumulation_steps == 16 * 8 * 16 * 2048
    assert (options.optimizer, options.beta1, options.beta2, options.eps) == ("adamw", 0.9, 0.95, 1e-8)
    assert (options.weight_decay, options.max_grad_norm, options.z_loss) == (0.1, 1.0, 1e-4)
    assert (options.iters, options.save_every, options.average_last) == (350_000, 5000, 5)

    def corenet_rate(iteration: int) -> float:
        top, low = RATES[name], RATES[name] / 10
        if iteration < 5000:
            return 1e-6 + iteration * (top - 1e-6) / 5000
        return low + 0.5 * (top - low) * (1 + math.cos(math.pi * (iteration - 5000) / 345_001))

    for iteration in (0, 1, 4999, 5000, 5001, 177_500, 349_999):
        assert schedule.learning_rate(options, iteration, options.iters) == pytest.approx(
            corenet_rate(iteration), rel=1e-9
        )


def test_the_first_steps_of_a_schedule_can_be_run_alone():
    options = recipe("openelm-270m")
    from dataclasses import replace

    short = replace(options, iters=100)
    short.check()
    assert schedule.learning_rate(short, 99, 100) == schedule.learning_rate(options, 99, 350_000)
