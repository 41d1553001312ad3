"""Model cards: front matter for the hub, text for readers, and what is kept from the original's card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mlx_openelm import convert
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.hub import catalog
from mlx_openelm.hub.resolve import DOCUMENT_PATTERNS, download
from mlx_openelm.publishing.card import Card, card_for_upload, write_card
from mlx_openelm.publishing.card_text import Quality
from mlx_openelm.publishing.command_line import command_line
from mlx_openelm.publishing.origin import Origin, find_origin

import pytest
from fake_hub import FakeHub
from huggingface_hub import ModelCard, metadata_load

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
APPLE = "---\nlicense: other\nlicense_name: apple-amlr\nlicense_link: LICENSE\nlanguage: en\n---\n\n# OpenELM\n"
PARAMETERS = 2_485_056


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder without a card."""
    out = tmp_path_factory.mktemp("models") / "packed"
    convert(SHAKESPEARE, out, quantize=True, q_group_size=128)
    (out / "README.md").unlink(missing_ok=True)
    return out


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "my-model")


@pytest.fixture
def apple(tmp_path: Path) -> Path:
    """The files in Apple's repository beside the weights."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "README.md").write_text(APPLE)
    (folder / "LICENSE").write_text("Apple's license\n")
    return folder


def sections(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def test_front_matter_is_parsed_by_huggingface_hub(folder: Path, apple: Path) -> None:
    origin = find_origin(apple, repo="apple/OpenELM-270M")
    write_card(folder, name="my-model", origin=origin, command="mlx-openelm convert")
    metadata = metadata_load(folder / "README.md")
    facts = metadata.pop("mlx_openelm")
    assert metadata == {
        "license": "other",
        "license_name": "apple-amlr",
        "license_link": "LICENSE",
        "language": "en",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "openelm", "4-bit"],
        "base_model": "apple/OpenELM-270M",
        "base_model_relation": "quantized",
    }
    assert facts["source"] == "apple/OpenELM-270M" and facts["command"] == "mlx-openelm convert"
    assert ModelCard.load(folder / "README.md").data.base_model == "apple/OpenELM-270M"
    assert (folder / "LICENSE").read_text() == "Apple's license\n"


def test_sizes_match_the_files(folder: Path, apple: Path) -> None:
    quality = [Quality("a play", 12345, 10.5, 10.125, 0.0123), Quality("a poem", 7, 3.0)]
    write_card(
        folder,
        name="my-model",
        origin=find_origin(apple, repo="apple/OpenELM-270M"),
        command="mlx-openelm convert --model 270m -q",
        method="gptq",
        recipe="mixed_3_6",
        quality=quality,
    )
    text = ModelCard.load(folder / "README.md").text
    assert sections(text) == [
        "# my-model",
        "## How it was made",
        "## Quantization",
        "## Measured quality",
        "## License",
        "## How to use",
    ]
    weights = folder / "model.safetensors"
    # Everything but the header is weights.
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    bits = 8 * (weights.stat().st_size - header) / PARAMETERS
    assert f"| Parameters | {PARAMETERS:,} |" in text and "| Layers | 6 |" in text
    assert f"| Bits per weight | {bits:.2f} |" in text
    assert f"| Weights on disk | {weights.stat().st_size / 1e6:.1f} MB |" in text
    # 128 does not divide rows of 192, which take 64; the first output projection is 96 wide and takes 32.
    rows = [row.split("|")[1:-1] for row in text.splitlines() if "| affine |" in row]
    config = json.loads((folder / "config.json").read_text())["quantization"]
    own = [entry for entry in config.values() if isinstance(entry, dict)]
    counts = [int(row[0]) for row in rows]
    assert sum(counts) == 4 * 6 + 1 and sum(counts[1:]) == len(own)
    assert [row[1].strip() for row in rows] == ["4"] * len(rows)
    assert [int(row[2]) for row in rows] == [64, 32, 128]
    assert rows[1][4].strip() == "`attn.out_proj` of layer 0" and rows[2][4].strip() == "`ffn.proj_2` of layers 0-5"
    assert "method `gptq` and recipe `mixed_3_6`" in text
    assert "| a play | 12,345 | 10.5000 | 10.1250 | 0.012300 |" in text
    assert "| a poem | 7 | 3.0000 |  |  |" in text
    assert "[apple-amlr](LICENSE)" in text
    assert "mlx-openelm convert --model 270m -q\n" in text
    assert "mlx-openelm generate --model my-model --prompt" in text and "mlx_lm.generate --model my-model" in text
    assert "transformers" not in text and "llama-cli" not in text


def test_plain_models_have_no_quantization(tmp_path: Path) -> None:
    out = tmp_path / "plain"
    convert(SHAKESPEARE, out, dtype="float32")
    write_card(out, name="plain", origin=find_origin(SHAKESPEARE))
    metadata, text = metadata_load(out / "README.md"), (out / "README.md").read_text()
    assert metadata["tags"] == ["mlx", "openelm"]
    assert not {"license", "base_model", "base_model_relation", "language"} & set(metadata)
    assert "## Quantization" not in text and "| Type | float32 |" in text and "| Bits per weight | 32.00 |" in text
    assert "No license came with the original" in text


# The origin of a model


def test_the_origin_of_tiny() -> None:
    origin = find_origin(catalog.TINY_FOLDER)
    assert (origin.name, origin.base_model, origin.metadata["license"]) == ("tiny", None, "mit")


def test_tiny_s_card(tmp_path: Path) -> None:
    out = tmp_path / "small"
    convert("tiny", out)
    write_card(out, name="small", origin=find_origin(catalog.TINY_FOLDER))
    assert "Shakespeare's plays and poems (public domain)" in (out / "README.md").read_text()
    # Converted again, it is still that model.
    again = find_origin(out)
    assert (again.name, again.base_model, again.metadata["license"]) == ("tiny", None, "mit")


def test_our_folder_converted_again_keeps_its_base_model(folder: Path, apple: Path) -> None:
    write_card(folder, name="x", origin=find_origin(apple, repo="apple/OpenELM-270M"))
    for repo in (None, "me/x"):
        again = find_origin(folder, repo=repo)
        assert again.base_model == again.name == "apple/OpenELM-270M" and again.relation is None
        assert again.metadata["license_link"] == "LICENSE" and again.licenses == (folder / "LICENSE",)


@pytest.mark.parametrize(
    ("card", "repo", "base", "relation"),
    [
        ("library_name: mlx\nbase_model: apple/OpenELM-1_1B", "mlx-community/a", "apple/OpenELM-1_1B", None),
        ("library_name: mlx\nbase_model: a/b\nbase_model_relation: finetune", "me/tuned", "me/tuned", None),
        ("library_name: mlx\nbase_model: a/b\nbase_model_relation: finetune", None, "a/b", "finetune"),
        ("library_name: transformers\nbase_model: a/b", "me/tuned", "me/tuned", None),
        ("license: mit", "apple/OpenELM-3B", "apple/OpenELM-3B", None),
        ("license: mit", None, None, None),
        ("license: [broken", "me/x", "me/x", None),
        ("- a\n- list", "me/x", "me/x", None),
    ],
)
def test_base_model(card: str, repo: str | None, base: str | None, relation: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\ntext\n")
    origin = find_origin(tmp_path, repo=repo)
    assert (origin.base_model, origin.relation) == (base, relation)


def test_a_fine_tune_stays_one_when_quantized(folder: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "README.md").write_text("---\nbase_model: apple/OpenELM-270M\nbase_model_relation: finetune\n---\n")
    write_card(folder, name="x", origin=find_origin(tuned))
    assert metadata_load(folder / "README.md")["base_model_relation"] == "finetune"
    assert "derived from [apple/OpenELM-270M]" in (folder / "README.md").read_text()


def test_folder_in_the_hub_s_cache_is_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--them--plays" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert find_origin(snapshot).base_model == "them/plays"


def test_folder_named_like_a_release_but_of_another_size_is_not_it(tmp_path: Path) -> None:
    impostor = shutil.copytree(SHAKESPEARE, tmp_path / "OpenELM-270M")
    assert find_origin(impostor).base_model is None


def test_cards_beside_a_file_are_used_only_in_our_own_folders(folder: Path, apple: Path) -> None:
    (apple / "model.gguf").write_bytes(b"GGUF")
    assert find_origin(apple / "model.gguf").metadata == {} and find_origin(apple / "model.gguf").licenses == ()
    write_card(folder, name="x", origin=find_origin(apple, repo="apple/OpenELM-270M"))
    assert find_origin(folder / "model.safetensors").base_model == "apple/OpenELM-270M"


def test_link_to_a_missing_license_points_to_the_original(apple: Path) -> None:
    (apple / "LICENSE").unlink()
    linked = find_origin(apple, repo="apple/OpenELM-270M").metadata["license_link"]
    assert linked == "https://huggingface.co/apple/OpenELM-270M/blob/main/LICENSE"
    assert "license_link" not in find_origin(apple).metadata


def test_a_file_too_large_for_a_license_is_not_copied(apple: Path) -> None:
    for size, licenses in ((1_000_000, (apple / "LICENSE",)), (1_000_001, ())):
        (apple / "LICENSE").write_bytes(b"x" * size)
        assert find_origin(apple).licenses == licenses


def test_a_model_from_random_weights_has_no_original(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(folder, name="x", origin=Origin("own sizes, trained from random weights", from_scratch=True))
    text = (folder / "README.md").read_text()
    assert "This is an OpenELM model (own sizes, trained from random weights), for MLX" in text
    assert "None is stated: the model was trained from random weights" in text
    assert "original" not in text and "authors" not in text
    assert find_origin(folder).from_scratch
    assert not find_origin(folder, repo="me/x").from_scratch  # the original is what was downloaded
    shapes = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    monkeypatch.setattr(ModelConfig, "from_name", lambda name: shapes)
    assert find_origin(folder.rename(folder.with_name("OpenELM-270M"))).base_model is None  # which is another model


def test_the_license_that_the_makers_of_a_model_choose_is_its_own(folder: Path) -> None:
    write_card(folder, name="x", origin=Origin("mine", metadata={"license": "mit"}, from_scratch=True))
    assert "The weights are under this license: mit." in (folder / "README.md").read_text()


def test_code_called_license_is_not_copied(apple: Path) -> None:
    (apple / "LICENSE.py").write_text("code")
    assert find_origin(apple).licenses == (apple / "LICENSE",)


# Links: a downloaded folder must not be able to link to private files of this machine


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt"])
def test_a_license_that_is_a_link_to_a_private_file_is_not_copied(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine example.com password secret")
    source = tmp_path / "source"
    source.mkdir()
    (source / name).symlink_to(tmp_path / ".netrc")
    origin = find_origin(source)
    assert origin.licenses == ()
    write_card(folder, name="x", origin=origin)
    assert not (folder / name).exists()
    assert not any(b"secret" in path.read_bytes() for path in folder.iterdir())


def test_a_card_that_is_a_link_to_a_private_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "private.md").write_text("---\nlicense: secret\nbase_model: me/secret\n---\n")
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").symlink_to(tmp_path / "private.md")
    origin = find_origin(source)
    assert (origin.name, origin.base_model, dict(origin.metadata)) == ("source", None, {})


def test_links_within_a_folder_and_linked_folders_are_allowed(apple: Path, tmp_path: Path) -> None:
    (apple / "LICENSE").rename(apple / "TERMS")
    (apple / "LICENSE").symlink_to("TERMS")
    (tmp_path / "shortcut").symlink_to(apple, target_is_directory=True)
    for path in (apple, tmp_path / "shortcut"):
        origin = find_origin(path, repo="apple/OpenELM-270M")
        assert [file.read_text() for file in origin.licenses] == ["Apple's license\n"]
        assert origin.metadata["license_name"] == "apple-amlr"


def test_links_in_the_hub_s_cache_may_only_point_to_its_own_blobs(apple: Path, hub: FakeHub) -> None:
    hub.add("them/plays", apple)
    snapshot = hub_folder("them/plays")
    assert (snapshot / "LICENSE").is_symlink()  # otherwise this test proves nothing
    assert [file.name for file in find_origin(snapshot).licenses] == ["LICENSE"]
    assert find_origin(snapshot).metadata["license_name"] == "apple-amlr"
    # Another repository's blobs are refused, and so are blobs that are links.
    cache = snapshot.parent.parent
    other = cache.with_name("models--me--private") / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("secret")
    (cache / "blobs" / "linked").symlink_to(other / "secret")
    for target in (other / "secret", cache / "blobs" / "linked"):
        (snapshot / "LICENSE").unlink()
        (snapshot / "LICENSE").symlink_to(target)
        assert find_origin(snapshot).licenses == ()


def hub_folder(repo: str) -> Path:
    return download(repo, patterns=DOCUMENT_PATTERNS)


# The license of Apple's models if their files came without one


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint from elsewhere, with no other files."""
    (tmp_path / "corenet").mkdir()
    (tmp_path / "corenet" / "checkpoint_average.pt").write_bytes(b"")
    return tmp_path / "corenet" / "checkpoint_average.pt"


def test_a_checkpoint_of_apple_s_gets_the_license_of_its_repository(
    apple: Path, bare: Path, folder: Path, hub: FakeHub
) -> None:
    (apple / "model.safetensors").write_bytes(b"weights")
    hub.add("apple/OpenELM-270M", apple)
    origin = find_origin(bare, base_model="apple/OpenELM-270M")
    assert dict(origin.metadata) == {
        "license": "other",
        "license_name": "apple-amlr",
        "license_link": "LICENSE",
        "language": "en",
    }
    assert sorted(hub.files_sent) == ["LICENSE", "README.md"]
    write_card(folder, name="x", origin=origin)
    assert (folder / "LICENSE").read_text() == "Apple's license\n"
    text = (folder / "README.md").read_text()
    assert "under the license of the original: [apple-amlr](LICENSE)" in text


@pytest.mark.parametrize("trouble", ["offline", "refused", "gone", "broken"])
def test_if_the_repository_is_unavailable_the_card_names_it(
    trouble: str, bare: Path, folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif trouble == "gone":
        hub.stop()
    elif trouble == "broken":
        hub.status = 500
    origin = find_origin(bare, base_model="apple/OpenELM-270M")  # "refused": there is no such repository
    assert (dict(origin.metadata), origin.licenses) == ({}, ())
    write_card(folder, name="x", origin=origin)
    metadata, text = metadata_load(folder / "README.md"), (folder / "README.md").read_text()
    assert not {"license", "license_name", "license_link"} & set(metadata)
    page = "[apple/OpenELM-270M](https://huggingface.co/apple/OpenELM-270M)"
    assert f"The weights are under the license of {page}: see its page." in text
    assert "No license came with" not in text


def test_the_hub_is_not_asked_unless_a_known_model_lacks_a_license(
    apple: Path, folder: Path, tmp_path: Path, hub: FakeHub
) -> None:
    hub.add("apple/OpenELM-270M", apple)
    hub.add("them/plays", apple)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "README.md").write_text("---\nbase_model: apple/OpenELM-270M\nbase_model_relation: finetune\n---\n")
    assert find_origin(SHAKESPEARE).base_model is None
    assert find_origin(folder).licenses == ()
    assert find_origin(folder, repo="them/plays").metadata == {}
    assert find_origin(tuned).metadata == {}  # a fine-tune need not have Apple's license
    assert find_origin(catalog.TINY_FOLDER).metadata["license"] == "mit"
    assert find_origin(apple, repo="apple/OpenELM-270M").licenses == (apple / "LICENSE",)
    # The card is the same in a dry run, which makes no request.
    (folder / "README.md").write_text("---\nlibrary_name: mlx\nbase_model: apple/OpenELM-270M\n---\n")
    card_for_upload(folder, "me/x")
    (folder / "README.md").unlink()
    card_for_upload(folder.rename(tmp_path / "OpenELM-270M"), "me/x")
    assert hub.requests == []


def test_offline_makes_no_request_even_for_a_known_model(bare: Path, apple: Path, hub: FakeHub) -> None:
    hub.add("apple/OpenELM-270M", apple)
    assert find_origin(bare, base_model="apple/OpenELM-270M", offline=True).metadata == {}
    assert hub.requests == []


# Other layouts


def test_hugging_face_layout_says_plainly_what_transformers_needs(tmp_path: Path) -> None:
    out = shutil.copytree(SHAKESPEARE, tmp_path / "exported")
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "apple/OpenELM-270M--configuration_openelm.OpenELMConfig"}
    (out / "config.json").write_text(json.dumps(config))
    write_card(out, name="exported", origin=Origin("apple/OpenELM-270M", "apple/OpenELM-270M"))
    metadata, text = metadata_load(out / "README.md"), (out / "README.md").read_text()
    assert (metadata["library_name"], metadata["tags"]) == ("transformers", ["openelm"])
    assert 'from_pretrained("exported", trust_remote_code=True)' in text
    assert "runs the model's code from [apple/OpenELM-270M]" in text and "fails in transformers 5" in text
    assert "mlx_lm" not in text


def test_the_card_of_a_gguf_file(tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    out.mkdir()
    (out / "openelm-270m-q8_0.gguf").write_bytes(b"GGUF" + bytes(2_000_000 - 4))
    origin = Origin("apple/OpenELM-270M", "apple/OpenELM-270M")
    write_card(out, name="gguf", origin=origin, method="q8_0", config=ModelConfig.from_name("OpenELM-270M"))
    metadata = metadata_load(out / "README.md")
    assert (metadata["library_name"], metadata["tags"]) == ("gguf", ["gguf", "openelm"])
    assert metadata["base_model_relation"] == "quantized"
    text = card_for_upload(out, "me/openelm").text
    assert "| Parameters | 271,527,168 |" in text and "| Layers | 16 |" in text
    assert "| `openelm-270m-q8_0.gguf` | 2.0 MB |" in text
    assert "Quantized with method `q8_0`." in text
    assert "llama-cli --hf-repo me/openelm --hf-file openelm-270m-q8_0.gguf" in text
    assert "mlx-openelm generate --model openelm-270m-q8_0.gguf" in text


# Cards at upload


def test_upload_names_the_repository_and_keeps_what_is_known(folder: Path, apple: Path) -> None:
    origin = find_origin(apple, repo="apple/OpenELM-270M")
    write_card(folder, name="x", origin=origin, method="awq", quality=[Quality("a play", 10, 2.5)])
    before = (folder / "README.md").read_text()
    card = card_for_upload(folder, "me/OpenELM-4bit")
    assert not card.is_own and (folder / "README.md").read_text() == before
    assert "# OpenELM-4bit\n" in card.text and 'load("me/OpenELM-4bit")' in card.text
    assert "mlx_lm.generate --model me/OpenELM-4bit" in card.text
    assert "method `awq`" in card.text and "| a play | 10 | 2.5000 |" in card.text
    # An uploaded model can be uploaded again elsewhere.
    (folder / "README.md").write_text(card.text)
    again = card_for_upload(folder, "you/other").text
    assert again == card.text.replace("me/OpenELM-4bit", "you/other").replace("# OpenELM-4bit", "# other").replace(
        metadata_load(folder / "README.md")["mlx_openelm"]["text"], again.split("  text: ")[1][:16]
    )


def test_front_matter_changed_by_hand_is_kept(folder: Path) -> None:
    write_card(folder, name="x", origin=find_origin(SHAKESPEARE))
    file = folder / "README.md"
    file.write_text(file.read_text().replace("- openelm\n", "- openelm\n- verse\n").replace("\n", "\r\n"), newline="")
    card = card_for_upload(folder, "me/x")
    assert not card.is_own and "- verse\n" in card.text and "--model me/x" in card.text


def test_edited_and_hand_written_cards_are_sent_as_they_are(folder: Path) -> None:
    write_card(folder, name="x", origin=find_origin(SHAKESPEARE))
    file = folder / "README.md"
    for text in (file.read_text() + "My notes.\n", "# Mine\n", "---\nlicense: mit\n---\n# Mine\n", ""):
        file.write_text(text)
        card = card_for_upload(folder, "me/x")
        assert card.is_own and card.text == text


def test_a_folder_without_a_card_gets_one(folder: Path) -> None:
    card = card_for_upload(folder, "me/x")
    assert not card.is_own and f"{PARAMETERS:,}" in card.text and "license:" not in card.text
    assert "How it was made" not in card.text and not (folder / "README.md").exists()


@pytest.mark.parametrize("content", [b"---\nlicense: [mit\n---\n# x\n", b"---\n- a\n---\n", b"\xff\xfe\x00"])
def test_a_damaged_card_is_refused_before_anything_is_sent(content: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(content)
    with pytest.raises(RequestError, match="README.md.*correct"):
        card_for_upload(folder, "me/x")


@pytest.mark.parametrize("facts", ["[]", "{quality: 3}", "{quality: [{text: a}]}", "{parameters: many}", "{text: 0}"])
def test_a_card_with_facts_we_did_not_write_counts_as_hand_written(facts: str, folder: Path) -> None:
    text = f"---\nmlx_openelm: {facts}\n---\n# x\n"
    (folder / "README.md").write_text(text)
    assert card_for_upload(folder, "me/x") == Card(text, is_own=True)


def test_command_line_hides_folders() -> None:
    flags = {
        "model": "/home/someone/private/model",
        "mlx_path": Path("/home/someone/out put"),
        "tokenizer": "~/tokens/tokenizer.model",
        "quantize": True,
        "dequantize": False,
        "q_bits": 4,
        "dtype": None,
        "recipe": "mixed_3_6",
        "revision": "v1.0",
        "stop": ["a", "b c"],
    }
    assert command_line("convert", flags) == (
        "mlx-openelm convert --model model --mlx-path 'out put' --tokenizer tokenizer.model --quantize --q-bits 4 "
        "--recipe mixed_3_6 --revision v1.0 --stop a --stop 'b c'"
    )
    assert command_line("convert", {"model": "apple/OpenELM-270M"}).endswith("--model apple/OpenELM-270M")


def test_command_line_hides_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of two parts looks like a hub repository; one that exists here is shown by its last part."""
    shutil.copytree(SHAKESPEARE, tmp_path / "acme-secret" / "run7")
    monkeypatch.chdir(tmp_path)
    named = {"model": "acme-secret/run7", "a": "acme-secret/run7/", "b": " acme-secret/run7 ", "c": "~nobody/x/y"}
    line = command_line("convert", named | {"d": "apple/OpenELM-270M", "e": "corenet:270M/mlx", "f": "me/x"})
    assert line == (
        "mlx-openelm convert --model run7 --a run7 --b run7 --c y --d apple/OpenELM-270M --e corenet:270M/mlx --f me/x"
    )
    convert("acme-secret/run7", "out")
    assert "acme-secret" not in (tmp_path / "out" / "README.md").read_text()
    assert metadata_load(tmp_path / "out" / "README.md")["mlx_openelm"]["source"] == "run7"
