"""The second tier of the prefix tree: files that survive a restart, are checked, and never fail a request."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import prefix_file
from mlx_openelm.generation.cache_origin import Origin
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.generation.prefix_disk import DEFAULT_BYTES, PrefixDisk
from mlx_openelm.generation.prefix_tree import PrefixTree

import mlx.core as mx
import pytest
from test_engine import shortened
from test_prefix_tree import KINDS, MUCH, PLAIN, contents, new, process, put, requests

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> Any:
    return shortened("tiny", dtype="float32")[0]


@pytest.fixture(scope="module")
def origin(model: Any) -> Origin:
    return Origin.of(model, "tiny")


@pytest.fixture
def start(model: Any, origin: Origin, tmp_path: Path) -> Any:
    """Makes a tree as a new process would."""

    def make(max_bytes: int = MUCH, disk_bytes: int = MUCH, origin: Origin = origin) -> PrefixTree:
        return PrefixTree(model, max_bytes, PrefixDisk(tmp_path / "held", origin, model.config, disk_bytes))

    return make


def files(folder: Path) -> list[Path]:
    return sorted((folder / "held").iterdir())


def check(model: Any, tree: PrefixTree, ids: list[int], options: CacheOptions, length: int | None = None) -> int:
    """The number of tokens that a request for `ids` finds, whose logits are those of plain prefill."""
    cache, found = tree.fetch(ids, options)
    assert length is None or found == length
    logits, expected = process(model, ids[found:], cache, 16), process(model, ids, new(model, options), 16)
    assert mx.abs(logits - expected).max().item() < {8: 0.05, 4: 1.0}.get(options.kv_bits or 0, 1e-4)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_found_after_a_restart(model: Any, start: Any, tmp_path: Path, kind: str) -> None:
    options, ids = KINDS[kind], list(range(3, 43))
    tree = start()
    for tokens in (ids, [*ids[:25], *range(100, 110)], [*ids[:10], 7, 8]):
        cache = new(model, options)
        process(model, tokens, cache, 8)
        tree.insert(tokens, cache)
    tree.save()
    held = [tree.fetch([*ids, 5], options)[1], tree.fetch([*ids[:25], *range(100, 112)], options)[1]]
    again = start()
    assert again.nbytes == 0  # nothing is read yet
    assert [
        check(model, again, [*ids, 5], options),
        check(model, again, [*ids[:25], *range(100, 112)], options),
    ] == held
    assert held == [40, 35] and again.nbytes == contents(again) > 0
    assert check(model, again, [9, 9], options) == 0


@pytest.mark.parametrize("kind", ["growing", pytest.param("8 bits", marks=pytest.mark.slow), "sliding", "wide"])
def test_random_requests_over_both_tiers_and_restarts(model: Any, start: Any, kind: str) -> None:
    """A memory that holds little, so that almost everything comes from files; a new process now and then."""
    options, reused = KINDS[kind], 0
    tree = start(20_000)
    for n, (ids, _) in enumerate(requests(5, 26)):
        if n % 9 == 8:
            tree.save()
            tree = start(20_000)
        reused += check(model, tree, ids, options)
        cache = new(model, options)
        process(model, ids, cache, 8)
        tree.insert(ids, cache)
        assert tree.nbytes == contents(tree) <= 20_000
    assert reused > 80


def test_what_memory_drops_is_written_and_read_again(model: Any, start: Any, tmp_path: Path) -> None:
    tree = start(1)
    ids = list(range(3, 43))
    put(model, tree, ids)
    assert tree.nbytes == 0 and len(files(tmp_path)) == 1
    assert check(model, tree, [*ids, 5], PLAIN) == 40
    put(model, tree, [*ids[:20], 7, 8])  # the file is split in two, and one added
    assert check(model, tree, [*ids[:20], 7, 8, 9], PLAIN) == 22 and check(model, tree, [*ids, 5], PLAIN) == 40
    assert len(files(tmp_path)) == 3


# What is not used.


def saved(model: Any, start: Any, kind: str = "growing") -> list[int]:
    tree, ids = start(), list(range(3, 43))
    cache = new(model, KINDS[kind])
    process(model, ids, cache, 8)
    tree.insert(ids, cache)
    tree.save()
    return ids


@pytest.mark.parametrize(
    "change", [{"fingerprint": "0" * 32}, {"dtype": "bfloat16"}, {"fingerprint": None}], ids=str
)  # fmt: skip
def test_files_of_other_weights_or_types_are_left_alone(
    model: Any, start: Any, origin: Origin, tmp_path: Path, change: dict[str, Any]
) -> None:
    ids = saved(model, start)
    other = Origin(**{**vars(origin), **change})
    tree = start(origin=other)
    assert tree.fetch(ids)[1] == 0
    put(model, tree, ids)
    tree.save()
    assert len(files(tmp_path)) == 2
    assert check(model, start(), ids, PLAIN) == 39


def test_an_adapter_or_another_model_has_another_origin(model: Any, origin: Origin) -> None:
    """The names do not matter, the weights do."""
    again = shortened("tiny", dtype="float32")[0]
    assert Origin.of(again, "another name", "v1").fingerprint == origin.fingerprint
    layer = again.transformer.layers[0].attn.qkv_proj
    layer.weight = layer.weight + 1e-3
    assert Origin.of(again).fingerprint != origin.fingerprint


@pytest.mark.parametrize(
    "kind", ["growing", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("8 bits", "sliding"))]
)
def test_damaged_files_are_dropped(model: Any, start: Any, tmp_path: Path, kind: str) -> None:
    """Cut off, with a flipped bit anywhere, empty, or another kind of file: a miss, and the file is gone."""
    ids = saved(model, start, kind)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    broken = [data[: len(data) * n // 7] for n in range(7)]
    for place in range(8, len(data), len(data) // 16):
        broken.append(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    for content in [*broken, b"text", b"\0" * 100]:
        path.write_bytes(content)
        tree = start()
        assert tree.fetch([*ids, 5], KINDS[kind])[1] in (0, 40)
        assert check(model, tree, [*ids, 5], KINDS[kind]) == (40 if path.exists() else 0)
        cache = new(model, KINDS[kind])
        process(model, ids, cache, 8)
        tree.insert(ids, cache)
        assert check(model, tree, [*ids, 5], KINDS[kind]) == 40
        for file in files(tmp_path):
            file.unlink()
    path.write_bytes(data)
    assert check(model, start(), [*ids, 5], KINDS[kind]) == 40


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "[3, 4]"},
        {"tokens": "[]"},
        {"tokens": '["a"]'},
        {"tokens": "["},
        {"start": "3"},
        {"start": "-1"},
        {"start": "x"},
        {"kind": "[]"},
        {"kind": '["quantized", 32, 8]'},
        {"kind": '["quantized", 0, 8]'},
        {"kind": "7"},
        {"numbers": "[40, 4, 12, 12]"},
        {"numbers": "7"},
    ],
    ids=str,
)
def test_files_that_contradict_themselves_are_of_no_use(
    model: Any, start: Any, tmp_path: Path, change: dict[str, str]
) -> None:
    ids = saved(model, start)
    (path,) = files(tmp_path)
    layers, notes = prefix_file.read(path)
    prefix_file.write(path, layers, {**notes, **change})
    tree = start()
    for name in ("growing", "8 bits", "sliding"):
        assert check(model, tree, [*ids, 5], KINDS[name]) == 0


def test_a_note_that_was_changed_is_damage(model: Any, start: Any, tmp_path: Path) -> None:
    """Other ids in the header would be answered with these keys and values."""
    ids = saved(model, start)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"[3, 4, ", b"[3, 5, ", 1))
    assert path.read_bytes() != data
    other = [3, 5, *ids[2:], 5]
    assert check(model, start(), other, PLAIN) == 0 and not path.exists()


def test_a_missing_note_is_damage(model: Any, start: Any, tmp_path: Path) -> None:
    saved(model, start)
    (path,) = files(tmp_path)
    layers, notes = prefix_file.read(path)
    for name in ("tokens", "start", "kind", "key", "numbers"):
        prefix_file.write(path, layers, {key: value for key, value in notes.items() if key != name})
        start()
        assert not path.exists()


def test_files_that_vanish(model: Any, start: Any, tmp_path: Path) -> None:
    """Another process removes them while this one runs."""
    ids = saved(model, start)
    tree = start()
    for path in files(tmp_path):
        path.unlink()
    assert check(model, tree, [*ids, 5], PLAIN) == 0
    put(model, tree, ids)
    assert check(model, tree, [*ids, 5], PLAIN) == 40


def test_a_beginning_that_is_gone_ends_the_prefix(model: Any, start: Any, tmp_path: Path) -> None:
    tree, ids = start(), list(range(3, 43))
    for count in (10, 20, 40):
        put(model, tree, ids[:count])
    tree.save()
    first = next(path for path in files(tmp_path) if prefix_file.read_notes(path)["start"] == "0")
    first.unlink()
    again = start()
    assert check(model, again, [*ids, 5], PLAIN) == 0
    assert files(tmp_path) == []  # the rest is of no use without it


def test_a_second_process_in_the_same_folder(model: Any, start: Any) -> None:
    """Each has split the sequences in its own way; whatever is found is right."""
    one, other = start(), start()
    ids = list(range(3, 43))
    put(model, one, ids)
    put(model, one, [*ids[:30], 7])
    put(model, other, ids[:20])
    put(model, other, [*ids[:10], 8])
    for tree in (one, other):
        tree.save()
    third = start()
    for tokens in ([*ids, 5], [*ids[:30], 7, 7], [*ids[:10], 8, 8], ids[:20]):
        check(model, third, tokens, PLAIN)
    assert check(model, third, [*ids, 5], PLAIN) >= 10


# The size.


def test_the_files_stay_within_their_size(model: Any, start: Any, tmp_path: Path) -> None:
    tree = start(1, 120_000)
    for ids, _ in requests(9, 30):
        put(model, tree, ids)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 120_000
    assert len(files(tmp_path)) > 3
    smaller = start(1, 35_000)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 35_000
    nodes = [node for root in smaller._roots.values() for node in root.children.values()]
    assert len(smaller._files) <= len(files(tmp_path)) and all(not node.is_free or node.children for node in nodes)


def test_no_nodes_are_left_of_files_that_were_removed(model: Any, start: Any, tmp_path: Path) -> None:
    tree = start(1, 100_000)
    for ids, _ in requests(9, 40):
        put(model, tree, ids)
    count, todo = 0, list(tree._roots.values())
    while todo:
        node = todo.pop()
        count, todo = count + 1, [*todo, *node.children.values()]
        assert node.children or not node.is_free or node.parent is None
    assert count < 3 * len(files(tmp_path)) + 2


def test_the_least_recently_used_file_goes_first_also_after_a_restart(model: Any, start: Any, tmp_path: Path) -> None:
    tree = start(1)
    ids = [[start, *range(100, 120)] for start in range(3, 7)]
    for tokens in ids:
        put(model, tree, tokens)
    tree.fetch([*ids[0], 5])
    size = max(path.stat().st_size for path in files(tmp_path))
    again = start(1, 2 * size + size // 2)
    assert [again.fetch([*tokens, 5])[1] for tokens in ids] == [21, 0, 0, 21]


def test_what_is_larger_than_the_tier_is_not_written(model: Any, start: Any, tmp_path: Path) -> None:
    tree = start(1, 1000)
    put(model, tree, list(range(3, 43)))
    assert files(tmp_path) == [] and tree.fetch(list(range(3, 43)))[1] == 0
    assert DEFAULT_BYTES == 4 << 30


# Failures.


def test_a_disk_that_cannot_be_written_is_told_once(
    model: Any, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OpenELMError("Writing failed: No space left on device.")

    tree = start(1)
    monkeypatch.setattr(prefix_file, "write", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first in range(3, 6):
            put(model, tree, [first, *range(100, 120)])
            assert check(model, tree, [first, *range(100, 120), 5], PLAIN) == 0
    assert len(caught) == 1 and "are not kept in" in str(caught[0].message) and files(tmp_path) == []


def test_a_folder_that_cannot_be_made(model: Any, origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used for prompt caches: "):
        PrefixDisk(tmp_path / "file" / "folder", origin, model.config)


def test_other_files_in_the_folder_are_left_alone(model: Any, start: Any, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    for name in ("notes.txt", "model.safetensors"):
        (tmp_path / "held" / name).write_text("mine")
    saved(model, start)
    start(1, 0)
    assert [path.name for path in files(tmp_path)] == ["model.safetensors", "notes.txt"]


def test_clear_forgets_memory_and_keeps_files(model: Any, start: Any) -> None:
    tree, ids = start(), list(range(3, 43))
    put(model, tree, ids)
    tree.save()
    tree.clear()
    assert tree.nbytes == 0 and check(model, tree, [*ids, 5], PLAIN) == 40


def test_a_wrong_size_removes_nothing(model: Any, start: Any) -> None:
    tree = start()
    put(model, tree, [1, 2, 3])
    tree.save()
    files = list(tree._disk.folder.iterdir())
    assert files
    for wrong in (-1, 1.5, "1GB"):
        with pytest.raises(RequestError, match="max_bytes must be a whole number of bytes, 0 or above, got"):
            start(disk_bytes=wrong)
    assert list(tree._disk.folder.iterdir()) == files
