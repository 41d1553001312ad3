"""Together with mlx-lm: its generators drive our model, our decoding its caches, and folders load both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_openelm import backend, convert, load
from mlx_openelm import cache as our_cache
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

mlx_lm = pytest.importorskip("mlx_lm")
their_generate = pytest.importorskip("mlx_lm.generate")
their_cache = pytest.importorskip("mlx_lm.models.cache")
their_utils = pytest.importorskip("mlx_lm.utils")

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
IDS, GREEDY = REFERENCE["ids"], REFERENCE["greedy"]
LONG = [IDS[0] + GREEDY[0], IDS[1], IDS[2] + GREEDY[2][:17], IDS[3][:2], IDS[1][:1], IDS[3] + GREEDY[3][:40]]
CACHES = {"ours": our_cache, "theirs": their_cache}


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return build_model(mlx_format.read(FOLDER), dtype="float32")


def plain_greedy(model: OpenELM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a pass over the whole sequence."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model.logits(model.hidden_states(mx.array([ids]))[:, -1]).argmax().item())
    return ids[len(prompt) :]


def our_tokens(model: OpenELM, prompt: list[int], count: int, **kwargs: Any) -> list[int]:
    return [token for token, _ in generate_step(model, prompt, max_tokens=count, **kwargs)]


def their_tokens(model: Any, prompt: list[int], count: int, **kwargs: Any) -> list[int]:
    steps = their_generate.generate_step(mx.array(prompt), model, max_tokens=count, **kwargs)
    return [int(token) for token, _ in steps]


# Their generators over our model.


@pytest.mark.covering
@pytest.mark.parametrize("caches", [None, "ours", "theirs"])
@pytest.mark.parametrize("prompt", range(4))
def test_their_generate_step_over_our_model(model: OpenELM, prompt: int, caches: str | None) -> None:
    kwargs = {} if caches is None else {"prompt_cache": [CACHES[caches].KVCache() for _ in model.layers]}
    assert their_tokens(model, IDS[prompt], 48, **kwargs) == GREEDY[prompt]


@pytest.mark.parametrize("prompt", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)), 3])
def test_our_generate_step_over_their_caches(model: OpenELM, prompt: int) -> None:
    caches = [their_cache.KVCache() for _ in model.layers]
    assert our_tokens(model, IDS[prompt], 48, cache=caches, prefill_step_size=4) == GREEDY[prompt]
    assert caches[0].offset == len(IDS[prompt]) + 47


def test_prefill_steps_and_their_logprobs(model: OpenELM) -> None:
    prompt = LONG[0]
    expected = plain_greedy(model, prompt, 10)
    theirs = list(their_generate.generate_step(mx.array(prompt), model, max_tokens=10, prefill_step_size=7))
    ours = list(generate_step(model, prompt, max_tokens=10, prefill_step_size=7))
    assert [int(t) for t, _ in theirs] == [t for t, _ in ours] == expected
    for (token, logprob), (_, logprobs) in zip(ours, theirs, strict=True):
        assert abs(logprob - logprobs[token].item()) < 1e-4


@pytest.mark.covering
@pytest.mark.parametrize("caches", CACHES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_caches_give_the_same_tokens(model: OpenELM, bits: int, caches: str) -> None:
    def make() -> list[Any]:
        return [CACHES[caches].QuantizedKVCache(32, bits) for _ in model.layers]

    ours = our_tokens(model, LONG[0], 12, cache=make())
    # mlx-lm leaves the last prompt token for the first step, which changes nothing but the order of sums.
    assert their_tokens(model, LONG[0], 12, prompt_cache=make()) == ours
    options = CacheOptions(kv_bits=bits, kv_group_size=32)
    plain = [CACHES[caches].KVCache() for _ in model.layers]
    own = our_tokens(model, LONG[0], 12, cache=plain, options=options)
    theirs = their_tokens(model, LONG[0], 12, kv_bits=bits, kv_group_size=32, quantized_kv_start=0)
    assert len(own) == len(theirs) == 12
    assert type(plain[0]).__name__ == "QuantizedKVCache"
    if bits == 8:
        assert own == plain_greedy(model, LONG[0], 12) == theirs


@pytest.mark.parametrize("caches", CACHES)
def test_sliding_caches_give_the_same_tokens(model: OpenELM, caches: str) -> None:
    def make() -> list[Any]:
        return [CACHES[caches].RotatingKVCache(24, keep=4) for _ in model.layers]

    prompt = LONG[0][:32]
    expected = our_tokens(model, prompt, 16, cache=make(), prefill_step_size=1)
    assert their_tokens(model, prompt, 16, prompt_cache=make(), prefill_step_size=1) == expected
    other = "theirs" if caches == "ours" else "ours"
    mixed = [CACHES[other].RotatingKVCache(24, keep=4) for _ in model.layers]
    assert our_tokens(model, prompt, 16, cache=mixed, prefill_step_size=1) == expected
    assert expected != plain_greedy(model, prompt, 16)


def run_batch(model: Any, prompts: list, counts: list[int], caches: str | None, **kwargs: Any) -> list[list[int]]:
    generator = their_generate.BatchGenerator(model, **kwargs)
    given = None
    if caches is not None:
        given = [[CACHES[caches].KVCache() for _ in model.layers] for _ in prompts]
    uids = generator.insert(prompts, max_tokens=counts, caches=given)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    finished: dict[int, str] = {}
    while len(finished) < len(uids):
        for response in generator.next_generated():
            tokens[response.uid].append(int(response.token))
            if response.finish_reason is not None:
                finished[response.uid] = response.finish_reason
    generator.close()
    return [tokens[uid] for uid in uids]


COUNTS = [5, 16, 1, 9, 12, 3]


@pytest.fixture(scope="module")
def expected_of_long(model: OpenELM) -> list[list[int]]:
    return [plain_greedy(model, prompt, count) for prompt, count in zip(LONG, COUNTS, strict=True)]


@pytest.mark.covering
@pytest.mark.parametrize("caches", [None, "ours"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"prefill_step_size": 5},
        {"prefill_batch_size": 2, "completion_batch_size": 3},
        {"prefill_batch_size": 1, "prefill_step_size": 3},
    ],
    ids=str,
)
def test_their_batch_generator_over_our_model(
    model: OpenELM, expected_of_long: list[list[int]], caches: str | None, sizes: dict
) -> None:
    """Prompts of 1 to 57 tokens, so rows at different offsets, that finish and join at different times."""
    assert run_batch(model, LONG, COUNTS, caches, **sizes) == expected_of_long


def test_their_batch_generator_with_stop_tokens(model: OpenELM) -> None:
    stop = GREEDY[0][10]
    generator = their_generate.BatchGenerator(model, stop_tokens=[[stop]], max_tokens=48)
    uids = generator.insert([IDS[0], IDS[1]])
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    reasons: dict[int, str] = {}
    while len(reasons) < 2:
        for response in generator.next_generated():
            tokens[response.uid].append(int(response.token))
            if response.finish_reason:
                reasons[response.uid] = response.finish_reason
    generator.close()
    assert tokens[uids[0]] == GREEDY[0][: GREEDY[0].index(stop) + 1]
    assert reasons[uids[0]] == "stop"


@pytest.mark.parametrize("caches", CACHES)
def test_a_batch_continues_from_histories(model: OpenELM, caches: str) -> None:
    """Caches with different histories are merged into a batch, and rows are extracted as single caches."""
    pasts = [LONG[0][:20], LONG[2][:5], []]
    rests = [LONG[0][20:], LONG[2][5:], LONG[5]]
    given = [[CACHES[caches].KVCache() for _ in model.layers] for _ in pasts]
    for past, cache in zip(pasts, given, strict=True):
        if past:
            model(mx.array([past]), cache)
    generator = their_generate.BatchGenerator(model, max_tokens=6)
    uids = generator.insert(rests, caches=given)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    kept: dict[int, list] = {}
    while len(kept) < 3:
        for response in generator.next_generated():
            tokens[response.uid].append(int(response.token))
            if response.finish_reason:
                kept[response.uid] = response.prompt_cache
    generator.close()
    for uid, prompt in zip(uids, (LONG[0], LONG[2], LONG[5]), strict=True):
        expected = plain_greedy(model, prompt, 11)
        assert tokens[uid] == expected[:6]
        # Whether or not the last token was processed, continue from what the cache holds.
        sequence = prompt + expected
        held = kept[uid][0].offset
        assert held in (len(prompt) + 5, len(prompt) + 6)
        assert our_tokens(model, sequence[held : len(prompt) + 8], 3, cache=kept[uid]) == expected[8:11]


@pytest.mark.parametrize("caches", CACHES)
def test_sliding_rows_in_a_batch_equal_single_sequences(model: OpenELM, caches: str) -> None:
    prompts, counts = [IDS[0], IDS[1], IDS[3]], [24, 18, 12]
    make = CACHES[caches].RotatingKVCache
    expected = [
        our_tokens(model, prompt, n, cache=[make(16) for _ in model.layers])
        for prompt, n in zip(prompts, counts, strict=True)
    ]
    generator = their_generate.BatchGenerator(model)
    uids = generator.insert(prompts, max_tokens=counts, caches=[[make(16) for _ in model.layers] for _ in prompts])
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    left = 3
    while left:
        for response in generator.next_generated():
            tokens[response.uid].append(int(response.token))
            left -= response.finish_reason is not None
    generator.close()
    assert [tokens[uid] for uid in uids] == expected


# Folders we write.


def logits_of(model: Any) -> np.ndarray:
    model.set_dtype(mx.float32)
    embedding = model.transformer.token_embeddings
    if not isinstance(model, OpenELM) and hasattr(embedding, "scales"):
        # mlx-lm's would give bfloat16 in modes whose scales are not floating-point numbers.
        packing = {"group_size": embedding.group_size, "bits": embedding.bits, "mode": embedding.mode}
        weight = mx.dequantize(embedding.weight, embedding.scales, embedding.get("biases"), **packing)
        model.transformer.token_embeddings = plain = nn.Embedding(1, 1)
        plain.weight = weight.astype(mx.float32)
    return np.array(model(mx.array([IDS[3]])))


def assert_equal_logits(folder: Path) -> None:
    theirs, config = their_utils.load_model(folder)
    # Packed on both sides, and computed in float32 on both.
    ours = build_model(mlx_format.read(folder), dtype="float32", expand=False)
    names = {name: value.shape for name, value in tree_flatten(ours.parameters())}
    assert names == {name: value.shape for name, value in tree_flatten(theirs.parameters())}
    assert np.abs(logits_of(ours) - logits_of(theirs)).max() < 1e-4
    assert "auto_map" not in config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_plain_folders_load_in_mlx_lm(tmp_path: Path, dtype: str) -> None:
    convert(FOLDER, tmp_path / "mlx", dtype=dtype)
    theirs, config = their_utils.load_model(tmp_path / "mlx")
    stored = {str(value.dtype) for _, value in tree_flatten(theirs.parameters())}
    assert stored == {f"mlx.core.{dtype}"}
    assert config["torch_dtype"] == dtype
    assert_equal_logits(tmp_path / "mlx")


# Every number of bits and every size of groups.
QUICK = ((2, 64), (3, 64), (4, 32), (8, 128))
QUANTIZED: list[Any] = [
    pytest.param("affine", bits, group, marks=() if (bits, group) in QUICK else pytest.mark.slow)
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
]
QUANTIZED += [pytest.param("mxfp4", None, None, marks=pytest.mark.slow), ("nvfp4", None, None), ("mxfp8", None, None)]


@pytest.mark.parametrize(("mode", "bits", "group"), QUANTIZED, ids=lambda v: str(v))
def test_quantized_folders_load_in_mlx_lm(tmp_path: Path, mode: str, bits: int | None, group: int | None) -> None:
    done = convert(FOLDER, tmp_path / "mlx", quantize=True, q_mode=mode, q_bits=bits, q_group_size=group)
    values = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert values["quantization"] == values["quantization_config"]
    if group == 64:
        # 96 values a row in the first output projection; every other row is a multiple of 64.
        assert values["quantization"]["transformer.layers.0.attn.out_proj"]["group_size"] == 32
        assert list(done.exceptions) == ["transformer.layers.0.attn.out_proj"]
    assert_equal_logits(tmp_path / "mlx")
    size = sum(path.stat().st_size for path in (tmp_path / "mlx").glob("*.safetensors"))
    header = 40_000
    assert 0 < size - done.bits_per_weight * 2_485_056 / 8 < header


def test_entries_of_any_kind_load_in_mlx_lm(tmp_path: Path) -> None:
    """Layers in different bits, and one left as it is."""
    convert(FOLDER, tmp_path / "mlx", dtype="float32")
    source = mlx_format.read(FOLDER)
    paths = [name.removesuffix(".weight") for name, shape in source.config.tensor_shapes().items() if len(shape) == 2]
    choices = {path: Quantization(32, (3, 4, 8)[i % 3]) for i, path in enumerate(paths) if i != 5}
    choices[paths[0]] = Quantization(64, 6)
    mlx_format.write(tmp_path / "mlx", Checkpoint(source.config, quantize_weights(source.weights, choices), choices))
    assert mlx_format.read(tmp_path / "mlx").quantization == choices
    assert_equal_logits(tmp_path / "mlx")


def test_a_folder_we_write_loads_with_its_tokenizer(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "mlx", dtype="float32")
    theirs, tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    own = Tokenizer.from_folder(tmp_path / "mlx")
    texts = [*REFERENCE["prompts"], "", " ", "  two  spaces ", "line\n\nbreak", "naïve 漢字 👩‍🚀"]
    for text in texts:
        assert tokenizer.encode(text) == own.encode(text), text
    for text, ids in zip(REFERENCE["prompts"], IDS, strict=True):
        assert own.encode(text) == ids
    assert tokenizer.eos_token_ids == own.eos_token_ids == {2}
    assert tokenizer.bos_token_id == own.bos_token_id == 1
    text = mlx_lm.generate(theirs, tokenizer, prompt=REFERENCE["prompts"][1], max_tokens=48)
    assert text.lstrip() == REFERENCE["decoded"][1]


def test_shards_load_in_mlx_lm(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "mlx", dtype="float32")
    (tmp_path / "mlx" / "model.safetensors").unlink()
    mlx_format.write(tmp_path / "mlx", mlx_format.read(FOLDER), max_shard_bytes=1_000_000)
    assert len(list((tmp_path / "mlx").glob("model-*.safetensors"))) > 3
    assert_equal_logits(tmp_path / "mlx")


# Folders mlx-lm writes.


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16"},
        {"quantize": True},
        {"quantize": True, "q_mode": "mxfp8"},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {},
                {"quantize": True, "q_bits": 8, "q_group_size": 32},
                {"quantize": True, "q_mode": "mxfp4"},
                {"quantize": True, "q_mode": "nvfp4"},
            )
        ),
    ],
    ids=str,
)
def test_folders_mlx_lm_writes_load_here(tmp_path: Path, settings: dict) -> None:
    convert(FOLDER, tmp_path / "source", dtype="float32")
    mlx_lm.convert(str(tmp_path / "source"), str(tmp_path / "theirs"), **settings)
    assert_equal_logits(tmp_path / "theirs")
    model, tokenizer = load(tmp_path / "theirs", exact_activations=True)
    assert tokenizer.encode(REFERENCE["prompts"][3]) == IDS[3]
    is_affine = settings.get("q_mode", "affine") == "affine"
    assert model.expanded == (bool(settings.get("quantize")) and not (is_affine and backend.has_kernels()))
    theirs, _ = their_utils.load_model(tmp_path / "theirs")
    theirs.set_dtype(mx.float32)
    assert np.abs(np.array(model(mx.array([IDS[3]]))) - logits_of(theirs)).max() < 1e-3


@pytest.mark.parametrize("recipe", ["mixed_2_6", pytest.param("mixed_4_6", marks=pytest.mark.slow)])
def test_mixed_recipes_of_mlx_lm_load_here(tmp_path: Path, recipe: str) -> None:
    """Its recipes reject the architecture; the entries such a folder would have are read all the same."""
    convert(FOLDER, tmp_path / "source", dtype="float32")
    bits = [int(b) for b in recipe.split("_")[1:]]

    def predicate(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 64:
            return False
        return {"bits": bits["ffn" in path], "group_size": 64}

    mlx_lm.convert(
        str(tmp_path / "source"), str(tmp_path / "theirs"), quantize=True, q_bits=bits[0], quant_predicate=predicate
    )
    assert_equal_logits(tmp_path / "theirs")


def test_a_hub_repository_without_quantization_modes(tmp_path: Path) -> None:
    """Older folders have a group size and bits but no mode, which means affine."""
    convert(FOLDER, tmp_path / "mlx", quantize=True, q_group_size=32)
    expected = mlx_format.read(tmp_path / "mlx").quantization
    shutil.copytree(tmp_path / "mlx", tmp_path / "old")
    values = json.loads((tmp_path / "mlx" / "config.json").read_text())
    del values["quantization_config"]
    del values["quantization"]["mode"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    assert mlx_format.read(tmp_path / "old").quantization == expected
    assert_equal_logits(tmp_path / "old")
