"""Per-matrix sensitivity to low-bit quantization, and the best bits for each matrix under a budget.

The cost of a choice is the KL divergence of the output, in nats per token, when only that matrix is rounded. It is
measured at 2 to 4 bits; for more bits it is scaled by the squared rounding error of the matrix's products.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import EMBEDDING, HEAD, LAYER_MATRICES, LAYERS, ModelConfig
from ..errors import RequestError
from ..finite import check_finite
from ..formats.mlx import Quantization
from ..formats.packing import bits_per_weight
from ..formats.rounding import round_error, round_nearest
from ..inputs import read_json
from ..model import OpenELM
from ..modules import module_at
from ..ops.packed import MODES
from .calibration import Batches, Progress, Stream, Teacher, output_moments

# Bits whose cost is measured, at group size 64 or the largest smaller one; other costs follow from rounding errors.
_MEASURED = (2, 3, 4)
_BITS = (2, 3, 4, 5, 6, 8)
# Equal steps of the budget in the dynamic program.
_STEPS = 4000
# Rows sampled from a matrix to compare errors.
_ROWS = 128


@dataclass(frozen=True)
class Sensitivities:
    """Costs by module path and choice, the name of the text they were measured on, and its tokens."""

    costs: dict[str, dict[Quantization, float]]
    text: str
    tokens: int

    def save(self, path: Path) -> None:
        """Write them as JSON for `read`."""
        costs = {
            module: [{"bits": c.bits, "group_size": c.group_size, "kl_divergence": cost} for c, cost in options.items()]
            for module, options in self.costs.items()
        }
        values = {"calibration": self.text, "tokens": self.tokens, "sensitivities": costs}
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read(path: Path, config: ModelConfig) -> Sensitivities:
    """Sensitivities from a file that `Sensitivities.save` wrote.

    Raises:
        RequestError: unreadable, damaged, or measured on a model of another shape.
    """
    content = read_json(path)
    try:
        costs = {
            module: {Quantization(o["group_size"], o["bits"]): float(o["kl_divergence"]) for o in options}
            for module, options in content["sensitivities"].items()
        }
        if not all(0 <= cost < math.inf for options in costs.values() for cost in options.values()):
            raise ValueError
        found = Sensitivities(costs, str(content["calibration"]), int(content["tokens"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestError(f"{path} has no sensitivities; leave --sensitivities out to measure them.") from None
    expected = {path: set(options) for path, options in candidates(config).items()}
    if {path: set(options) for path, options in costs.items()} != expected:
        raise RequestError(f"{path} was measured on a model of another shape; leave --sensitivities out.")
    return found


def candidates(config: ModelConfig) -> dict[str, list[Quantization]]:
    """The choices for each matrix by module path: every affine bit width with every group size that divides it."""
    sizes = sorted(MODES["affine"][1])
    return {
        path: options
        for path, (_, in_dims) in config.matrix_shapes().items()
        if (options := [Quantization(size, bits) for bits in _BITS for size in sizes if in_dims % size == 0])
    }


def measure(
    model: OpenELM, batches: Batches, *, text: str, dtype: mx.Dtype = mx.bfloat16, progress: Progress | None = None
) -> Sensitivities:
    """The cost of every choice for every matrix of a full model, on `batches` of tokens [batch, length].

    Args:
        text: the name of the text, for a saved file.
        dtype: the type that scales and biases will be stored in.
        progress: called with the matrices done so far and in all.

    Raises:
        OpenELMError: weights or what the model computes are not finite.
    """
    choices = candidates(model.config)
    stream, teacher = Stream(model, batches), Teacher(model, batches)
    costs: dict[str, dict[Quantization, float]] = {}
    total = len(choices)
    for path in (EMBEDDING, HEAD):
        if path in choices:
            moments = output_moments(model, teacher, path)

            def rerun() -> float:
                return teacher.compare(model, Stream(model, batches).through(model.layers))[0]

            costs[path] = _costs(model, path, moments, choices[path], dtype, rerun)
            _report(progress, len(costs), total)
    for index, layer in enumerate(model.layers):
        layer_moments = stream.moments(layer)
        for name in LAYER_MATRICES:
            path = f"{LAYERS}{index}.{name}"
            if path not in choices:
                continue

            def rerun_from(index: int = index) -> float:
                return teacher.compare(model, stream.through(model.layers[index:]))[0]

            costs[path] = _costs(model, path, layer_moments[name], choices[path], dtype, rerun_from)
            _report(progress, len(costs), total)
        stream.advance(layer)
    return Sensitivities(costs, text, teacher.tokens)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _costs(
    model: OpenELM,
    path: str,
    moments: mx.array,
    options: list[Quantization],
    dtype: mx.Dtype,
    divergence: Callable[[], float],
) -> dict[Quantization, float]:
    """The cost of each option for the matrix at `path`; `divergence` measures the model in its present state."""
    module = module_at(model, path)
    weight = module["weight"]
    check_finite(weight, f"{path}.weight", "quantized")  # also in rows of tokens that the text does not contain
    size = max((o.group_size for o in options if o.group_size <= 64), default=options[0].group_size)
    measured: dict[int, tuple[float, float]] = {}  # bits to cost and error
    sample = weight[:: max(1, weight.shape[0] // _ROWS)]
    errors = {option: round_error(sample, moments, option, dtype) for option in options}
    for bits in _MEASURED:
        choice = Quantization(size, bits)
        module["weight"] = round_nearest(weight, moments, choice, dtype).astype(weight.dtype)
        measured[bits] = divergence(), errors[choice]
        module["weight"] = weight
    costs = {}
    for option in options:
        cost, error = measured[min(option.bits, max(_MEASURED))]
        costs[option] = cost * errors[option] / max(error, 1e-30)
    return costs


def assign(
    costs: Mapping[str, Mapping[Quantization, float]], config: ModelConfig, target_bpw: float, dtype: mx.Dtype
) -> dict[str, Quantization]:
    """The choices with the least sum of costs that take at most `target_bpw` bits per parameter, by module path.

    Dynamic programming over the budget in equal steps: each matrix adds its best option at every budget.

    Args:
        dtype: the stored type of tensors that are not quantized.

    Raises:
        RequestError: even the smallest choices need more bits.
    """
    shapes = config.matrix_shapes()
    sizes = {path: {o: _bits(o, shapes[path]) for o in options} for path, options in costs.items()}
    smallest = sum(min(options.values()) for options in sizes.values())
    largest = sum(max(options.values()) for options in sizes.values()) - smallest
    spare = (target_bpw - check_target(target_bpw, config, dtype)) * config.num_parameters
    # Rounding up wastes up to one step per matrix, and the largest choices must fit if the budget allows them.
    room = min(spare, largest * _STEPS / (_STEPS - len(sizes)))
    unit = room / _STEPS or 1.0
    # Steps beyond the smallest option of each matrix, rounded up so that the budget is never exceeded.
    steps = {
        path: {o: -int(-(size - min(options.values())) // unit) for o, size in options.items()}
        for path, options in sizes.items()
    }
    return _spend(costs, steps, int(room / unit + 1e-9))


def _spend(
    costs: Mapping[str, Mapping[Quantization, float]], steps: Mapping[str, Mapping[Quantization, int]], budget: int
) -> dict[str, Quantization]:
    """One option for each matrix, with the least sum of costs and at most `budget` steps in all."""
    picks: dict[str, mx.array] = {}
    with mx.stream(mx.cpu):
        least = mx.zeros((budget + 1,))  # the least cost of the matrices so far, for every budget
        for path, options in steps.items():
            totals = []
            for option, extra in options.items():
                shifted = [mx.full((min(extra, budget + 1),), mx.inf), least[: max(0, budget + 1 - extra)]]
                totals.append(mx.concatenate(shifted) + costs[path][option])
            table = mx.stack(totals)  # [options, budget + 1]
            least, picks[path] = table.min(axis=0), table.argmin(axis=0)
        mx.eval(least, picks)
    remaining = budget
    result: dict[str, Quantization] = {}
    for path in reversed(list(steps)):
        option = list(steps[path])[int(picks[path][remaining].item())]  # type: ignore[arg-type]
        result[path] = option
        remaining -= steps[path][option]
    return {path: result[path] for path in costs}


def check_target(target_bpw: float, config: ModelConfig, dtype: mx.Dtype) -> float:
    """The fewest bits per parameter that the model can have; call it before measuring.

    Raises:
        RequestError: `target_bpw` is less than that.
    """
    smallest = {
        path: min(options, key=lambda o: _bits(o, config.matrix_shapes()[path]))
        for path, options in candidates(config).items()
    }
    least = bits_per_weight(config, smallest, dtype.size)
    if not target_bpw >= least:
        raise RequestError(f"--target-bpw {target_bpw:g} is too small: this model needs at least {least:.2f}.")
    return least


def _bits(choice: Quantization, shape: tuple[int, int]) -> int:
    """The bits of a packed matrix of `shape` [out, in], with scales and biases of 16 bits each."""
    parts = choice.packed_shapes(shape)
    return 32 * math.prod(parts["weight"]) + 32 * math.prod(parts["scales"])
