"""Prints the README's table of the models: download, and memory at 2048 tokens by the type or bits of the weights.

    python benchmarks/sizes.py

The figures are those of `mlx-openelm info` on a CPU with our kernels. Packed weights are in groups of 64, as `-q` makes
them, and the rest is bfloat16.
"""

from __future__ import annotations

import argparse

from mlx_openelm import backend
from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.hub import catalog
from mlx_openelm.hub.catalog import Release
from mlx_openelm.jobs.summary import Summary, summarize_config
from mlx_openelm.quantization.recipes import plan
from mlx_openelm.wording import size

HEADER = ("base", "instruct", "parameters", "download", "float32", "bfloat16", "8 bits", "4 bits")
ALIGNMENT = ("---", "---", "---:", "---:", "---:", "---:", "---:", "---:")
GROUP_SIZE = 64


def stored_as(config: ModelConfig, dtype: str, bits: int | None = None) -> Summary:
    """A model's summary with weights of type `dtype`, or packed into `bits` bits with the rest as `dtype`."""
    packing = {} if bits is None else plan(config, Quantization(GROUP_SIZE, bits))[0]
    return summarize_config(config, packing, name="", source="config", dtype=dtype)


def cells(base: Release, instruct: Release) -> list[str]:
    """The cells of a size's row: its two releases have the same shapes."""
    config = ModelConfig.from_name(base.name)
    published = stored_as(config, "float32")  # as Apple's repositories have it
    others = [stored_as(config, "bfloat16"), *(stored_as(config, "bfloat16", bits) for bits in (8, 4))]
    return [
        *(f"[`{release.aliases[0]}`](https://huggingface.co/{release.hub_repo})" for release in (base, instruct)),
        f"{published.parameters:,}",
        size(published.storage_bytes),
        *(size(summary.memory.total) for summary in (published, *others)),
    ]


def table() -> list[str]:
    """The lines of the Markdown table."""
    releases = catalog.releases()
    rows = [cells(base, instruct) for base, instruct in zip(releases[::2], releases[1::2], strict=True)]
    return [f"| {' | '.join(row)} |" for row in (HEADER, ALIGNMENT, *rows)]


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    if not backend.has_kernels():
        raise SystemExit("The table is for a CPU with our kernels, which docs/cpu.md says how to install.")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
