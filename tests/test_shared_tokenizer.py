"""The tokenizer shared by all published models: accepted copies, where they are searched for, and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.hub import catalog, corenet
from mlx_openelm.sources import open_source
from mlx_openelm.text import shared_tokenizer
from mlx_openelm.text.shared_tokenizer import FALLBACK, LLAMA2, Identity, accept, candidates, find
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import pytest
import sentencepiece
from fake_hub import FakeHub
from test_sources import Server

FIXTURE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
REAL = Path(__file__).parents[2] / "shared" / "reference" / "llama2-tokenizer"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs Llama 2's tokenizer")
TEXT = "To be, or not to be:\n  42 Größen ½ 🦙"


def release(name: str = "1.1b-instruct") -> catalog.Release:
    found = catalog.find(name)
    assert found is not None
    return found


def identity_of(model: Path) -> Identity:
    """The identity of the fixture's tokenizer, computed with SentencePiece."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return Identity(
        pieces.vocab_size(),
        pieces.bos_id(),
        pieces.eos_id(),
        sha256(model.read_bytes()).hexdigest(),
        {TEXT: " ".join(map(str, pieces.encode(TEXT)))},
    )


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> Identity:
    """The small fixture takes the place of Llama 2's."""
    identity = identity_of(FIXTURE / "tokenizer.model")
    monkeypatch.setattr(shared_tokenizer, "LLAMA2", identity)
    return identity


def copy(folder: Path, *names: str, template: str | None = None) -> Path:
    """A folder with the fixture's tokenizer in these files."""
    source = folder.with_name(f"{folder.name}-saved")
    Tokenizer.from_folder(FIXTURE).save(source)
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(source / name, folder / name)
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def lookalike(folder: Path) -> Path:
    """The same number of pieces and special tokens, but two pieces swapped."""
    copy(folder, "tokenizer.json")
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    one, other = "\u2581be", "\u2581not"
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


# Accepted copies.


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.model"], ["tokenizer.json", "tokenizer.model"]])
def test_copies_are_accepted(tmp_path: Path, right: Identity, names: list[str]) -> None:
    tokenizer = accept(copy(tmp_path / "t", *names), right, eos_token_ids={2, 5})
    assert tokenizer is not None
    assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    assert tokenizer.eos_token_ids == {2, 5}


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 2049},
        {"bos_token_id": 2},
        {"eos_token_id": 1},
        {"ids": {TEXT: "5 6"}},
        {"sha256": "0" * 64},
    ],
)
def test_a_copy_must_match_every_property(tmp_path: Path, right: Identity, change: dict[str, object]) -> None:
    folder = copy(tmp_path / "t", "tokenizer.json", "tokenizer.model")
    assert accept(folder, right) is not None
    assert accept(folder, replace(right, **change)) is None  # type: ignore[arg-type]


def test_other_tokenizers_are_not_accepted(tmp_path: Path, right: Identity) -> None:
    assert accept(lookalike(tmp_path / "a"), right) is None
    (tmp_path / "empty").mkdir()
    assert accept(tmp_path / "empty", right) is None
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = copy(tmp_path / f"b-{name}", name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
        assert accept(folder, right) is None
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1")
        assert accept(folder, right) is None


def test_a_wrong_json_beside_the_right_model(tmp_path: Path, right: Identity) -> None:
    """Only the model file, whose checksum matches, is used."""
    folder = lookalike(tmp_path / "a")
    shutil.copy(FIXTURE / "tokenizer.model", folder)
    tokenizer = accept(folder, right)
    assert tokenizer is not None
    assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    (folder / "tokenizer.json").write_text("{")
    assert accept(folder, right) is not None


@needs_real
def test_the_known_ids_equal_llama_2s() -> None:
    model = REAL / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (pieces.vocab_size(), pieces.bos_id(), pieces.eos_id()) == (32000, 1, 2)
    assert sha256(model.read_bytes()).hexdigest() == LLAMA2.sha256
    for text, ids in LLAMA2.ids.items():
        assert " ".join(map(str, pieces.encode(text))) == ids


@needs_real
def test_llama_2s_is_accepted_and_a_lookalike_is_not(tmp_path: Path) -> None:
    expected = json.loads((REAL / "expected.json").read_text())
    (tmp_path / "model").mkdir()
    shutil.copy(REAL / "tokenizer.model", tmp_path / "model")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(spec_of(REAL / "tokenizer.model")))
    for folder in (tmp_path / "model", tmp_path / "json", REAL):
        tokenizer = accept(folder, LLAMA2)
        assert tokenizer is not None
        for row in expected:
            assert tokenizer.encode(row["text"], add_bos=False) == row["ids"], row["text"]
    spec = json.loads((tmp_path / "json" / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["\u2581Hello"], vocab["\u2581world"] = vocab["\u2581world"], vocab["\u2581Hello"]
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(spec))
    assert accept(tmp_path / "json", LLAMA2) is None
    # Another tokenizer with 32,000 pieces, BOS 1 and EOS 2, found in the wild beside the right model file.
    shutil.copy(REAL / "tokenizer.json", tmp_path / "json")
    tokenizer = accept(tmp_path / "json", LLAMA2)
    assert tokenizer is None or all(tokenizer.encode(row["text"], add_bos=False) == row["ids"] for row in expected)


def spec_of(model: Path) -> dict[str, object]:
    """Llama 2's `tokenizer.json` from its pieces, as transformers made it: merges in the order of their scores."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (pieces.get_score(i), len(token[:cut]), len(token[cut:]), token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], -merge[1], -merge[2]))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prepend, change = {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **special} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, {**change, "content": "\u2581"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [f"{left} {right}" for *_, left, right in merges],
        },
    }


# Where copies are searched for.


@pytest.mark.parametrize("known", catalog.releases(), ids=lambda known: known.name)
def test_candidates_of_each_model(known: catalog.Release) -> None:
    repos = candidates(known)
    assert repos[0] == f"mlx-community/{known.name}"
    assert repos[-1] == FALLBACK == "hf-internal-testing/llama-tokenizer"
    assert len(repos) == len(set(repos)) == 25
    for size in ("270M", "450M", "1_1B", "3B"):
        for kind in ("", "-Instruct", "-4bit", "-Instruct-8bit"):
            assert f"mlx-community/OpenELM-{size}{kind}" in repos


@pytest.mark.parametrize(
    "repo",
    [
        "mlx-community/OpenELM-1_1B-Instruct",
        "mlx-community/OpenELM-270M",
        "mlx-community/OpenELM-1_1B-Instruct-8bit",
        "mlx-community/OpenELM-3B-4bit",
        FALLBACK,
    ],
)
def test_any_candidate_serves(hub: FakeHub, tmp_path: Path, right: Identity, repo: str) -> None:
    hub.add(repo, copy(tmp_path / "served", "tokenizer.model", template="of another"))
    (tmp_path / "served" / "model.safetensors").write_text("weights")
    tokenizer = find(release(), eos_token_ids={2})
    assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    assert set(hub.files_sent) == {"tokenizer.model", "tokenizer_config.json"}
    # One request for each missing repository.
    requested = [path for _, path in hub.requests if path.endswith("/revision/main")]
    names = candidates(release())
    assert requested == [f"/api/models/{name}/revision/main" for name in names[: names.index(repo) + 1]]
    is_own = repo == release().tokenizer_repo
    assert tokenizer.chat_template == ("of another" if is_own else None)


def test_other_tokenizers_are_skipped(hub: FakeHub, tmp_path: Path, right: Identity) -> None:
    hub.add("mlx-community/OpenELM-1_1B-Instruct", lookalike(tmp_path / "wrong"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    hub.add("mlx-community/OpenELM-270M", tmp_path / "bare")
    hub.add("mlx-community/OpenELM-3B", tmp_path / "bare", gated=403)
    hub.add("mlx-community/OpenELM-3B-4bit", copy(tmp_path / "right", "tokenizer.json"))
    tokenizer = find(release())
    assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]


@pytest.mark.covering
@pytest.mark.parametrize("stop", ["network", "offline", 503, 429])
@pytest.mark.parametrize(
    "repo",
    ["mlx-community/OpenELM-1_1B-Instruct", "mlx-community/OpenELM-270M-6bit", "apple/OpenELM-3B", FALLBACK],
)
def test_a_copy_in_the_cache_serves_without_a_network(
    hub: FakeHub, tmp_path: Path, right: Identity, repo: str, stop: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any repository and revision, and before any request."""
    from huggingface_hub import constants, snapshot_download

    served = copy(tmp_path / "served", "tokenizer.json")
    hub.add(repo, served, refs={"main", "old"})
    snapshot_download(repo, revision="old", allow_patterns=["tokenizer.json"])
    lookalike(tmp_path / "wrong")
    shutil.copy(tmp_path / "wrong" / "tokenizer.json", served)
    snapshot_download(repo, allow_patterns=["tokenizer.json"])
    count = len(hub.requests)
    if stop == "network":
        hub.stop()
    elif stop == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.status = int(stop)
    for name in ("1.1b-instruct", "450m"):
        tokenizer = find(release(name))
        assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    assert len(hub.requests) == count


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_copy_of_any_model_in_the_cache_serves(
    tmp_path: Path, right: Identity, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After those of the known repositories, and without reading files that have another size."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshots = [tmp_path / "cache" / f"models--{repo}" / "snapshots" / "abc" for repo in ("a--a", "b--b", "c--c")]
    shutil.copytree(copy(tmp_path / "served", name, template="of another"), snapshots[1])
    for folder, content in ((snapshots[0], "[]"), (snapshots[2], " " * 1_000_000)):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(content)
    assert list(shared_tokenizer._cached(release())) == [snapshots[1]]
    tokenizer = find(release())
    assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    assert tokenizer.chat_template is None
    known = tmp_path / "cache" / "models--mlx-community--OpenELM-3B" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "served", known)
    assert list(shared_tokenizer._cached(release())) == [known, snapshots[1]]


def test_every_way_to_load_a_model_finds_it(
    hub: FakeHub, tmp_path: Path, right: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's repository, a folder of its files, a CoreNet checkpoint, and its downloaded MLX port."""
    hub.add("mlx-community/OpenELM-450M-Instruct", copy(tmp_path / "served", "tokenizer.model"))
    bare = tmp_path / "OpenELM-270M"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, bare)
    hub.add("apple/OpenELM-270M", bare)
    server = Server()
    monkeypatch.setenv(corenet.URL_VARIABLE, server.url)
    monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "cache"))
    weights = {n.removeprefix("transformer."): w for n, w in mx.load(str(FIXTURE / "model.safetensors")).items()}
    mx.save_safetensors(str(tmp_path / "w.safetensors"), weights)
    values = json.loads((FIXTURE / "config.json").read_text()) | {"model_name": "custom", "padding_index": 2048}
    server.files["mlx/270M/weights.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    server.files["mlx/270M/config.json"] = json.dumps(values).encode()
    models: list[str | Path] = ["270m", bare, "corenet:270M/mlx"]
    options: list[dict[str, Path]] = [{}, {}, {}]
    if (reference := REAL.parent / "shakespeare-corenet.pt").exists():
        (tmp_path / "own").mkdir()
        models.append(Path(shutil.copy(reference, tmp_path / "own" / "OpenELM-270M.pt")))
        options.append({"config_yaml": reference.with_suffix(".yaml")})
    try:
        for model, more in zip(models, options, strict=True):
            tokenizer = open_source(model, **more).tokenizer  # type: ignore[arg-type]
            assert tokenizer.encode(TEXT, add_bos=False) == [int(number) for number in right.ids[TEXT].split()]
    finally:
        server.close()
    assert hub.files_sent.count("tokenizer.model") == 1


# Messages.


def message(hub: FakeHub, change: Callable[[FakeHub], None], kind: type[OpenELMError], requests: int) -> str:
    change(hub)
    hub.requests.clear()
    with pytest.raises(OpenELMError) as caught:
        find(release())
    assert type(caught.value) is kind
    assert len(hub.requests) <= requests
    text = str(caught.value)
    assert "\n" not in text and "with tokenizer" in text.replace("`", "") and FALLBACK in text
    return text


def test_no_copy_anywhere(hub: FakeHub) -> None:
    text = message(hub, lambda hub: None, RequestError, 25)
    assert "neither in mlx-community/OpenELM-1_1B-Instruct, nor in those of its siblings" in text


@pytest.mark.parametrize("status", [401, 403])
def test_only_gated_copies(hub: FakeHub, tmp_path: Path, status: int) -> None:
    folder = copy(tmp_path / "served", "tokenizer.json")
    text = message(
        hub, lambda hub: hub.add("mlx-community/OpenELM-270M", folder, gated=status) and None, OpenELMError, 40
    )
    assert "mlx-community/OpenELM-270M is gated: accept its conditions" in text


@pytest.mark.parametrize(("status", "words"), [(503, "has a server error"), (429, "limits your requests")])
def test_a_hub_that_cannot_answer_is_asked_once(hub: FakeHub, status: int, words: str) -> None:
    assert words in message(hub, lambda hub: setattr(hub, "status", status), OpenELMError, 6)
    assert {path for _, path in hub.requests} == {"/api/models/mlx-community/OpenELM-1_1B-Instruct/revision/main"}


def test_a_wrong_token_is_reported_at_once(hub: FakeHub) -> None:
    assert "refuses your token" in message(hub, lambda hub: setattr(hub, "rejects_token", True), OpenELMError, 2)


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert "Cannot reach 127.0.0.1" in message(hub, FakeHub.stop, OpenELMError, 0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in message(hub, lambda hub: None, OpenELMError, 0)
