"""The eight releases: names in every spelling, pairings, and the numbers of the paper."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.hub import catalog
from mlx_openelm.wording import did_you_mean

import pytest

NAMES = [f"OpenELM-{size}{kind}" for size in ("270M", "450M", "1_1B", "3B") for kind in ("", "-Instruct")]


def test_the_eight_releases_in_order() -> None:
    assert [release.name for release in catalog.releases()] == NAMES
    assert [release.size for release in catalog.releases()][::2] == ["270M", "450M", "1.1B", "3B"]
    assert [release.instruct for release in catalog.releases()] == [False, True] * 4


@pytest.mark.parametrize("name", NAMES)
def test_repositories(name: str) -> None:
    release = catalog.find(name)
    assert release is not None
    assert release.hub_repo == f"apple/{name}"
    assert release.tokenizer_repo == f"mlx-community/{name}"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("270m", "OpenELM-270M"),
        ("450m-instruct", "OpenELM-450M-Instruct"),
        ("1.1b", "OpenELM-1_1B"),
        ("1_1B", "OpenELM-1_1B"),
        ("1.1B-Instruct", "OpenELM-1_1B-Instruct"),
        ("3b", "OpenELM-3B"),
        ("OpenELM-1.1B", "OpenELM-1_1B"),
        ("openelm-1_1b-instruct", "OpenELM-1_1B-Instruct"),
        ("apple/OpenELM-270M", "OpenELM-270M"),
        ("Apple/openelm-3b-INSTRUCT", "OpenELM-3B-Instruct"),
        (" 3b ", "OpenELM-3B"),
    ],
)
def test_find_in_every_spelling(spelling: str, name: str) -> None:
    release = catalog.find(spelling)
    assert release is not None and release.name == name


@pytest.mark.parametrize("name", ["", "tiny", "7b", "OpenELM", "mlx-community/OpenELM-270M", "me/OpenELM-270M"])
def test_unknown_names_are_not_found(name: str) -> None:
    assert catalog.find(name) is None


def test_find_by_repository() -> None:
    assert [catalog.find_repo(f"apple/{name}") for name in NAMES] == list(catalog.releases())
    # Only Apple's own repository: not aliases, folders or other people's copies.
    for other in ("270m", "OpenELM-270M", "mlx-community/OpenELM-270M", "", None, ["apple/OpenELM-270M"]):
        assert catalog.find_repo(other) is None


def test_each_release_has_one_alias() -> None:
    assert [release.aliases for release in catalog.releases()] == [
        ("270m",),
        ("270m-instruct",),
        ("450m",),
        ("450m-instruct",),
        ("1.1b",),
        ("1.1b-instruct",),
        ("3b",),
        ("3b-instruct",),
    ]


def test_the_big_models_have_the_smallest_of_the_same_kind_as_drafts() -> None:
    drafts = {release.name: release.draft for release in catalog.releases()}
    assert drafts == {
        name: None
        if "270M" in name or "450M" in name
        else "OpenELM-270M-Instruct"
        if "Instruct" in name
        else "OpenELM-270M"
        for name in NAMES
    }


def test_only_the_3b_models_cannot_be_float16() -> None:
    assert [r.name for r in catalog.releases() if not r.float16] == ["OpenELM-3B", "OpenELM-3B-Instruct"]


def test_display_names_follow_the_paper() -> None:
    assert [r.display_name for r in catalog.releases()][4:6] == ["OpenELM-1.1B", "OpenELM-1.1B-Instruct"]


@pytest.mark.parametrize(
    ("name", "suite", "task", "percent"),
    [
        ("270m", "zero_shot", "arc_challenge", 26.45),
        ("270m-instruct", "zero_shot", "average", 55.11),
        ("1.1b", "openllm", "average", 45.93),
        ("3b-instruct", "llm360", "mmlu", 24.8),
        ("3b", "zero_shot", "average", 67.39),
    ],
)
def test_published_scores(name: str, suite: str, task: str, percent: float) -> None:
    release = catalog.find(name)
    assert release is not None and release.scores(suite)[task] == percent


def test_zero_shot_averages_agree_with_their_tasks() -> None:
    for release in catalog.releases():
        scores = release.scores()
        average = scores.pop("average")
        assert len(scores) == 7
        assert sum(scores.values()) / 7 == pytest.approx(average, abs=0.011)


def test_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(RequestError, match="known: zero_shot, llm360, openllm"):
        catalog.releases()[0].scores("mmlu")


def test_scores_handed_out_are_a_copy() -> None:
    catalog.releases()[0].scores().clear()
    assert catalog.releases()[0].scores()["sciq"] == 84.7


def test_packaged_scores_are_complete() -> None:
    path = catalog.ASSETS / "published_scores.json"
    data = json.loads(path.read_text())
    assert {suite: sorted(rows) for suite, rows in data["scores"].items()} == {
        suite: sorted(NAMES) for suite in ("zero_shot", "llm360", "openllm")
    }
    assert data["lm_eval_settings"]["add_bos_token"] is True


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("tinny", "tiny"),
        ("270", "270m"),
        ("3b-instrct", "3b-instruct"),
        ("OpenELM-270", "OpenELM-270M"),
        ("openelm-1.1b-instuct", "OpenELM-1.1B-Instruct"),
        ("apple/OpenELM-3B-Instuct", "apple/OpenELM-3B-Instruct"),
        ("mlx-comunity/OpenELM-450M", "mlx-community/OpenELM-450M"),
    ],
)
def test_a_misspelled_name_gets_suggestions(wrong: str, right: str) -> None:
    assert did_you_mean(wrong, catalog.names()).startswith(f"did you mean {right}")


def test_no_suggestion_for_dissimilar_names() -> None:
    assert did_you_mean("gpt2", catalog.names()) == ""


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("corenet:270M/checkpoint_average", ["pretrained/270M/checkpoint_average.pt"]),
        ("corenet:450m/mlx-4bit", ["mlx/450M-4bit/config.json", "mlx/450M-4bit/weights.safetensors"]),
        ("corenet:270M/lora", ["peft/openelm_lora_270M.pt"]),
        ("corenet:1_1b/dora", ["peft/openelm_dora_1.1B.pt"]),
        ("corenet:3B/dora.pt", ["peft/openelm_dora_3B.pt"]),
    ],
)
def test_files_of_corenet(name: str, files: list[str]) -> None:
    assert list(catalog.corenet_files(name)) == files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("corenet:270M/nothing", "with adapter_path, lora or dora"),
        ("corenet:270M/loro", "did you mean lora"),
        ("corenet:270M-instruct/lora", "is not a CoreNet download"),
    ],
)
def test_files_corenet_never_published(name: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        catalog.corenet_files(name)
    assert words in str(caught.value)


def test_importing_is_light() -> None:
    code = (
        "import sys; before = set(sys.modules); import mlx_openelm.hub.catalog, mlx_openelm.hub.resolve;"
        "heavy = {'huggingface_hub', 'httpx2', 'httpx', 'requests', 'transformers', 'mlx_lm', 'tqdm'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names_of_corenets_files():
    assert catalog.corenet_name(" CoreNet:270M/lora ") == "270M/lora"
    assert [catalog.corenet_name(other) for other in ("270m", "corenet", Path("corenet:270M/lora"), None)] == 4 * [None]
    lower, upper = (catalog.corenet_files(f"{prefix}:270M/mlx") for prefix in ("corenet", "CORENET"))
    assert lower == upper == ("mlx/270M/config.json", "mlx/270M/weights.safetensors")
