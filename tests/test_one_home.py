"""Constants and helpers that several modules use are defined once."""

from __future__ import annotations

import ast
import functools
from dataclasses import replace
from pathlib import Path

import mlx_openelm
from mlx_openelm.config import EMBEDDING, HEAD, LAYER_MATRICES, LAYERS, NORM, ModelConfig
from mlx_openelm.formats.adapter import FILES, PROJECTIONS, TARGET_MODULES
from mlx_openelm.loading import load
from mlx_openelm.model import OpenELM
from mlx_openelm.modules import module_at, output_layer, replace_at
from mlx_openelm.wording import flag, one_of, size, some

import mlx.core as mx
import mlx.nn as nn
import pytest
from package_trees import tree_of

PACKAGE = Path(mlx_openelm.__file__).parent


def constants_of(tree: ast.AST) -> list[object]:
    """The strings, numbers and tuples of them in a file's code."""
    return [ast.literal_eval(node) for node in ast.walk(tree) if _is_constant(node)]


def files_with(constant: object) -> list[str]:
    """The files of the package whose code, docstrings aside, holds a constant."""
    return sorted(
        file
        for file, values in package_constants().items()
        if any(type(v) is type(constant) and v == constant for v in values)
    )


def files_with_path(path: str) -> list[str]:
    """The files whose code holds a module path or the path of something in it: `lm_head`, or `lm_head.weight`."""
    inside = path if path.endswith(".") else f"{path}."
    return sorted(
        file
        for file, values in package_constants().items()
        if any(isinstance(v, str) and f"{v}.".startswith(inside) for v in values)
    )


def _is_constant(node: ast.AST) -> bool:
    if isinstance(node, ast.Tuple):
        return all(map(_is_constant, node.elts))
    return isinstance(node, ast.Constant)


@functools.cache  # not at import: every process that collects the tests imports this module
def package_constants() -> dict[str, list[object]]:
    return {str(path.relative_to(PACKAGE)): constants_of(tree_of(path)) for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("path", [EMBEDDING, LAYERS, NORM, HEAD])
def test_a_module_path_has_one_home_with_any_suffix(path):
    assert files_with_path(path) == ["config.py"]


@pytest.mark.parametrize(
    ("constant", "home"),
    [
        (EMBEDDING, "config.py"),
        (LAYERS, "config.py"),
        ("corenet:", "hub/catalog.py"),
        *((name, "formats/adapter.py") for name in FILES),
        (LAYER_MATRICES, "config.py"),
        (("lora", "dora", "full"), "formats/mlx_adapter.py"),
        (("truncate", "refuse"), "training/data/examples.py"),
    ],
)
def test_a_constant_has_one_home(constant, home):
    assert files_with(constant) == [home]


def test_paths_equal_those_of_the_configuration():
    config = ModelConfig.from_name("OpenELM-270M")
    first = [f"{LAYERS}0.{path}" for path in LAYER_MATRICES]
    assert list(config.matrix_shapes())[:5] == [EMBEDDING, *first]
    assert f"{HEAD}.weight" not in config.tensor_shapes()
    assert (PROJECTIONS, TARGET_MODULES[0]) == (("qkv_proj", "out_proj", "proj_1", "proj_2"), "token_embeddings")
    assert TARGET_MODULES[1:] == PROJECTIONS


def test_a_part_is_found_and_replaced_by_its_path():
    model, _ = load("tiny")
    second = model.layers[1]
    assert module_at(model, f"{LAYERS}1.ffn.proj_1") is second.ffn.proj_1
    assert module_at(second, "") is second
    linear, weight = nn.Linear(2, 2), mx.ones((3,))
    replace_at(model, f"{LAYERS}1.ffn.proj_1", linear)
    replace_at(model, "transformer.norm.weight", weight)
    assert second.ffn.proj_1 is linear and model.transformer.norm["weight"] is weight
    with pytest.raises(KeyError):
        module_at(model, "transformer.classifier")


@pytest.mark.parametrize("shared", [True, False])
def test_the_output_layer(shared):
    model = OpenELM(replace(load("tiny")[0].config, share_input_output_layers=shared))
    assert output_layer(model) is (model.transformer.token_embeddings if shared else model.lm_head)


def test_flags_choices_and_sizes_in_messages():
    assert flag("q_group_size") == "--q-group-size"
    assert [one_of(range(n)) for n in (1, 2, 3)] == ["0", "0 or 1", "0, 1 or 2"]
    sizes = [0, 512, 999, 999.6, 3_100_000, 12_149_000_000, 1e13]
    assert list(map(size, sizes)) == ["0 B", "512 B", "999 B", "1.0 kB", "3.1 MB", "12.1 GB", "10000.0 GB"]


def test_long_lists_of_names_are_cut_and_counted():
    names = [str(n) for n in range(10)]
    assert some(names[:2]) == "0, 1"
    assert some(names, separator="; ") == "0; 1; 2; 3; 4; 5; 6; 7 and 2 more"
    assert some(names[:8]) == "0, 1, 2, 3, 4, 5, 6, 7" and some(names[:8], 100).endswith("7 and 92 more")
