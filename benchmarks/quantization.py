"""Quality of quantized models: KL divergence from the full model on held-out text, by size and method.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --without-mlx-lm --json

The model is the small one in tests/fixtures, trained on Shakespeare; the text is a play it has not seen. All programs
calibrate on the same text, by default the bundled one. Rows compare divergences at the same size: with plain affine
quantization (`convert -q`), interpolated between bit widths in the logarithm, and with mlx-lm's own methods.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm import load
from mlx_openelm.evaluation.windows import load_documents, make_windows
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.packing import bits_per_weight
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.jobs.convert import convert
from mlx_openelm.jobs.quantize import quantize
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM
from mlx_openelm.quantization.options import QuantizeOptions
from mlx_openelm.quantization.report import Evaluator
from mlx_openelm.quantization.text import read_text

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
GROUP_SIZE = 64
METHODS = ("awq", "gptq", "dwq")
COMBINATIONS = (("gptq", "dwq"), ("awq", "gptq", "dwq"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", help="a text file or .jsonl; by default the bundled text")
    parser.add_argument("--windows", type=int, default=85, help="windows of 256 tokens of the play to measure on")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--without-mlx-lm", action="store_true", help="leave out mlx-lm's methods")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        lab = Lab(Path(temporary), arguments.calibration, arguments.windows)
        for measured in (lab.budgets, lab.methods) + (() if arguments.without_mlx_lm else (lab.mlx_lm,)):
            for row in measured(arguments.only):
                rows.append(row)
                if not arguments.json:
                    print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def make_row(name: str, ours: float, other: float, bar: float) -> dict[str, Any]:
    ratio = ours / other
    return {"name": name, "ours": ours, "other": other, "ratio": ratio, "bar": bar, "pass": ratio <= bar}


def as_text(row: dict[str, Any]) -> str:
    verdict = "pass" if row["pass"] else "FAIL"
    return f"{row['name']:58} {row['ours']:9.5f} {row['other']:9.5f}  {row['ratio']:.3f} (bar {row['bar']:g}) {verdict}"


class Lab:
    """The full model as a folder, the text, and earlier measurements."""

    def __init__(self, folder: Path, calibration: str | None, windows: int):
        self.folder, self.calibration, self.count = folder, calibration, 0
        self.full = folder / "full"
        convert(FIXTURES / "shakespeare-hf", self.full, dtype="float32")
        model, self.tokenizer = load(self.full, dtype="float32")
        self.config = model.config
        held_out = make_windows(self.tokenizer, load_documents(FIXTURES / "valid.jsonl"), 256)
        step = max(1, len(held_out) // windows)
        self.evaluator = Evaluator(model, held_out[::step][:windows])
        self.plain: dict[int, tuple[float, float]] = {}  # bits: bits per weight and divergence

    def divergence(self, model: OpenELM) -> float:
        return self.evaluator.measure(model)[1]

    def affine(self, bits: int) -> tuple[float, float]:
        """Bits per weight and divergence of plain affine quantization."""
        if bits not in self.plain:
            self.plain[bits] = self.ours(q_bits=bits)
        return self.plain[bits]

    def affine_at(self, size: float) -> float:
        """The divergence of plain affine quantization at any size, interpolated between bit widths in its logarithm."""
        points = sorted(self.affine(bits) for bits in (2, 3, 4, 5))
        return math.exp(np.interp(size, [p[0] for p in points], [math.log(p[1]) for p in points]))

    def ours(self, **options: Any) -> tuple[float, float]:
        """Bits per weight and divergence of the model that `quantize` writes."""
        self.count += 1
        out = self.folder / f"ours-{self.count}"
        learned = "method" in options or "target_bpw" in options
        options |= {"calibration": self.calibration} if learned else {}
        # Sensitivities are measured once, and reused.
        known = self.folder / "sensitivities.json"
        if "target_bpw" in options and known.exists():
            options["sensitivities"] = str(known)
        done = quantize(self.full, out, QuantizeOptions(**options))
        if (out / "sensitivities.json").exists():
            known.write_bytes((out / "sensitivities.json").read_bytes())
        assert done.bits_per_weight is not None
        return done.bits_per_weight, self.divergence(load(out, dtype="float32")[0])

    def budgets(self, only: str) -> Iterator[dict[str, Any]]:
        for target in (3.25, 3.75, 4.25):
            name = f"--target-bpw {target} vs affine at its size"
            if only in name:
                size, divergence = self.ours(target_bpw=target)
                yield make_row(name, divergence, self.affine_at(size), 1.0)

    def methods(self, only: str) -> Iterator[dict[str, Any]]:
        for bits in (3, 4):
            for method in METHODS:
                name = f"--q-bits {bits} --method {method} vs affine"
                if only in name:
                    yield make_row(name, self.ours(q_bits=bits, method=(method,))[1], self.affine(bits)[1], 0.85)
            name = f"best combination vs affine {bits}-bit, at its size"
            if only in name:
                size, plain = self.affine(bits)
                found = {each: self.ours(target_bpw=size, method=each)[1] for each in COMBINATIONS}
                best = min(found, key=lambda each: found[each])
                yield make_row(f"{name}: {','.join(best)}", found[best], plain, 0.6)

    # mlx-lm's methods, with our calibration windows in place of the text it would download.

    def windows(self) -> list[list[int]]:
        """The windows that our methods calibrate on."""
        options = QuantizeOptions(method=("gptq",), calibration=self.calibration)
        return read_text(self.tokenizer, self.config, options).windows

    def theirs(self) -> Any:
        from mlx_lm.utils import load as load_theirs

        return load_theirs(str(self.full))[0]

    def measure_theirs(self, model: Any) -> tuple[float, float, dict[str, Quantization]]:
        """Bits per weight, divergence and choices of a model that mlx-lm quantized in place."""
        choices = {
            path: Quantization(module.group_size, module.bits)
            for path, module in model.named_modules()
            if hasattr(module, "scales")
        }
        stored = {
            name: array.astype(mx.bfloat16) if array.dtype != mx.uint32 else array
            for name, array in dict(tree_flatten(model.parameters())).items()
        }
        checkpoint = Checkpoint(self.config, Weights.of_arrays(stored), choices)
        size = bits_per_weight(self.config, choices, 2)
        return size, self.divergence(build_model(checkpoint, dtype="float32")), choices

    def mlx_lm(self, only: str) -> Iterator[dict[str, Any]]:
        for target in (3.75, 4.25):
            name = f"--target-bpw {target} vs mlx-lm dynamic_quant"
            if only in name:
                size, theirs = self.dynamic_quant(target)
                yield make_row(name, self.ours(target_bpw=size)[1], theirs, 1.0)
        for bits in (3, 4):
            name = f"--q-bits {bits} --method dwq vs mlx-lm dwq"
            if only in name:
                yield make_row(name, self.ours(q_bits=bits, method=("dwq",))[1], self.dwq(bits), 1.0)
        for bits in (2, 4):
            name = f"--method gptq at the size of mlx-lm gptq {bits}-bit"
            if only in name:
                size, theirs = self.gptq(bits)
                yield make_row(name, self.ours(target_bpw=size, method=("gptq",))[1], theirs, 1.0)

    def dynamic_quant(self, target: float) -> tuple[float, float]:
        import mlx.nn as nn
        from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

        # Groups must divide every row, and 64 does not divide the first layer's. Groups of 32 take one bit per weight.
        size = 32
        low = int(target) - 1
        high = low + 1
        model, data = self.theirs(), mx.array(self.windows())
        costs = dict(estimate_sensitivities(model, data, low, size, high, size))
        threshold = estimate_threshold(model, costs, target, low, size, high, size)

        def choice_for(path: str, module: Any) -> Any:
            if not hasattr(module, "to_quantized"):
                return False
            return {"bits": high if costs[path] > threshold else low, "group_size": size}

        model.set_dtype(mx.bfloat16)
        nn.quantize(model, class_predicate=choice_for)
        bits_per_weight, divergence, _ = self.measure_theirs(model)
        return bits_per_weight, divergence

    def dwq(self, bits: int) -> float:
        import mlx.nn as nn
        import mlx.optimizers as optimizers
        from mlx_lm.quant.dwq import dwq_quantize

        full, model = self.theirs(), self.theirs()
        nn.quantize(
            model,
            class_predicate=lambda path, module: (
                {"bits": bits, "group_size": next(g for g in (GROUP_SIZE, 32) if module.weight.shape[-1] % g == 0)}
                if hasattr(module, "to_quantized")
                else False
            ),
        )
        data = [(window, 0) for window in self.windows()]
        dwq_quantize(
            model,
            lambda batch, index, split: full(batch),
            optimizers.Adam(learning_rate=1e-6, bias_correction=True),
            data[len(data) // 8 :] * 2,
            data[: len(data) // 8],
            batch_size=4,
            max_seq_length=513,
            seed=0,
            dtype=mx.float32,
        )
        return self.measure_theirs(model)[1]

    def gptq(self, bits: int) -> tuple[float, float]:
        from mlx_lm.quant.gptq import gptq_quantize

        # Its groups must divide every row, and 64 does not divide the first layer's.
        model, _ = gptq_quantize(self.theirs(), mx.array(self.windows()), bits, 32, 6, 64)
        size, divergence, _ = self.measure_theirs(model)
        return size, divergence


if __name__ == "__main__":
    main()
