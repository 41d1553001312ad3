"""The models by name: the eight OpenELM releases, and those inside the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..wording import did_you_mean

ASSETS = Path(__file__).parent.parent / "assets"
TINY = "tiny"
TINY_FOLDER = ASSETS / TINY
# The models inside the package and their folders: one writes like Shakespeare, one drafts for it, one chats.
TINY_CHAT = "tiny-instruct"
PACKAGED = {name: ASSETS / name for name in (TINY, "tiny-draft", TINY_CHAT)}
PACKAGED_DRAFTS = dict.fromkeys((TINY, TINY_CHAT), "tiny-draft")

# A repository with the tokenizer of all published models, Llama 2's: it is not gated, and has the exact file.
TOKENIZER_REPO = "hf-internal-testing/llama-tokenizer"

# Where Apple publishes CoreNet's own files: intermediate checkpoints, with and without training state, the average of
# the last five (which is the published model), the folders of CoreNet's MLX port, and adapters.
# Names from CoreNet's README-pretraining.md, mlx_examples/open_elm/README.md and README-peft.md.
CORENET_URL = "https://docs-assets.developer.apple.com/ml-research/models/corenet/v0.1.0/openelm"
CORENET_ITERATIONS = (*range(50_000, 300_001, 50_000), *range(330_000, 350_001, 5_000))
_CORENET_PREFIX = "corenet:"
_CORENET_PORTS = {"mlx": "", "mlx-4bit": "-4bit"}
_CORENET_ADAPTERS = ("lora", "dora")
_CORENET_CHECKPOINTS = (
    "checkpoint_average",
    *(f"checkpoint_epoch_0_iter_{iteration - 1}" for iteration in CORENET_ITERATIONS),
    *(f"training_checkpoint_epoch_0_iter_{iteration - 1}" for iteration in CORENET_ITERATIONS),
    "training_checkpoint_last",
)


@dataclass(frozen=True)
class Release:
    """One published model.

    `name` is spelled as in Apple's repositories (`OpenELM-1_1B-Instruct`), `size` as in the paper (`1.1B`).
    `hub_repo` holds the float32 weights but no tokenizer; `tokenizer_repo` is the ungated community copy that is tried
    first. `draft` is the `name` of the release that drafts for this one in speculative decoding, if one is much
    smaller.
    """

    name: str
    size: str
    instruct: bool
    hub_repo: str
    tokenizer_repo: str
    aliases: tuple[str, ...]
    draft: str | None

    @property
    def display_name(self) -> str:
        """The name as the paper prints it: `OpenELM-1.1B-Instruct`."""
        return self.name.replace("_", ".")

    @property
    def float16(self) -> bool:
        """Whether it runs in float16."""
        return ModelConfig.from_name(self.name).fits_float16

    def scores(self, suite: str = "zero_shot") -> dict[str, float]:
        """Published scores in percent by task, with their `average`.

        Suites are named after the paper (arXiv:2404.14619): `zero_shot`, `llm360`, `openllm`.
        Raises RequestError for another suite.
        """
        suites = published_scores()["scores"]
        if suite not in suites:
            raise RequestError(
                f"There are no published scores for the suite {quote(suite)}; known: {', '.join(suites)}"
            )
        return dict(suites[suite][self.name])


_RELEASES = tuple(
    Release(
        name=(name := f"OpenELM-{size.replace('.', '_')}{suffix}"),
        size=size,
        instruct=suffix == "-Instruct",
        hub_repo=f"apple/{name}",
        tokenizer_repo=f"mlx-community/{name}",
        aliases=(f"{size}{suffix}".lower(),),
        draft=None if size in ("270M", "450M") else f"OpenELM-270M{suffix}",
    )
    for size in ("270M", "450M", "1.1B", "3B")
    for suffix in ("", "-Instruct")
)
_BY_NAME = {
    name.lower().replace("_", "."): release for release in _RELEASES for name in (release.name, *release.aliases)
}


def releases() -> tuple[Release, ...]:
    """The eight releases, smallest first, each base model before its instruct model."""
    return _RELEASES


def find(name: str) -> Release | None:
    """The release that `name` means, or None.

    An alias (`1.1b-instruct`) or Apple's name, with or without `apple/`, in any case, with `1.1B` or `1_1B`.
    Other owners' repositories (`mlx-community/OpenELM-270M`) are not releases: their weights differ.
    """
    return _BY_NAME.get(name.strip().lower().removeprefix("apple/").replace("_", "."))


def find_repo(repo: object) -> Release | None:
    """The release that Apple publishes as the hub repository `repo` (`apple/OpenELM-270M`), or None."""
    return next((release for release in _RELEASES if release.hub_repo == repo), None)


def corenet_name(name: object) -> str | None:
    """The part SIZE/NAME of a name `corenet:SIZE/NAME` (any case); None for other names and for a Path."""
    text = name.strip() if isinstance(name, str) else ""
    return text[len(_CORENET_PREFIX) :] if text.lower().startswith(_CORENET_PREFIX) else None


def corenet_checkpoints(name: str) -> dict[int, str]:
    """The names of the published checkpoints of `corenet:SIZE` by iteration: `corenet:270M/checkpoint_...`.

    Raises RequestError for a name or a size that was never published.
    """
    size = corenet_name(name)
    if not size or "/" in size:
        raise RequestError(f"--checkpoints must be {_CORENET_PREFIX} and a size, as in corenet:270M, got {quote(name)}")
    found = {step: f"{_CORENET_PREFIX}{size}/checkpoint_epoch_0_iter_{step - 1}" for step in CORENET_ITERATIONS}
    for checkpoint in found.values():
        corenet_files(checkpoint)
    return found


def corenet_files(name: str) -> tuple[str, ...]:
    """The paths below `CORENET_URL` that `corenet:SIZE/NAME` stands for; the files of one model share a folder.

    NAME is a checkpoint without its `.pt`, `mlx` or `mlx-4bit` (a folder of the MLX port), or `lora` or `dora` (an
    adapter trained on CommonSense170k, whose file includes the base model).
    Raises RequestError for a size or name that was never published.
    """
    size, _, file = (corenet_name(name) or name).partition("/")
    release = find(size)
    sizes = tuple(dict.fromkeys(known.size for known in _RELEASES))
    if release is None or release.instruct:
        raise RequestError(
            f"{quote(name)} is not a CoreNet download: give corenet:SIZE/NAME, where SIZE is one of "
            f"{', '.join(sizes)}, as in corenet:270M/checkpoint_average"
        )
    file = file.removesuffix(".pt")
    if file in _CORENET_PORTS:
        folder = f"mlx/{release.size}{_CORENET_PORTS[file]}"
        return f"{folder}/config.json", f"{folder}/weights.safetensors"
    if file in _CORENET_CHECKPOINTS:
        return (f"pretrained/{release.size}/{file}.pt",)
    if file in _CORENET_ADAPTERS:
        return (f"peft/openelm_{file}_{release.size}.pt",)
    hint = did_you_mean(file, (*_CORENET_CHECKPOINTS, *_CORENET_PORTS, *_CORENET_ADAPTERS))
    hint = f" ({hint})" if hint else ""
    first, last = (f"checkpoint_epoch_0_iter_{CORENET_ITERATIONS[i] - 1}" for i in (0, -1))
    raise RequestError(
        f"{quote(name)} is not a published file{hint}: after corenet:{release.size}/ give checkpoint_average, "
        f"{first} to {last}, the same with training_ in front, mlx or mlx-4bit; with --adapter-path, lora or dora"
    )


def names() -> list[str]:
    """Every name of a published model or its tokenizer, and of the models inside the package."""
    known = [*PACKAGED]
    for release in _RELEASES:
        known += [
            *release.aliases,
            release.name,
            release.display_name,
            release.hub_repo,
            release.tokenizer_repo,
        ]
    return known


def published_scores() -> dict[str, Any]:
    """Everything published about the models' quality: suites, shots, settings, scores in percent.

    From the model card of apple/OpenELM and arXiv:2404.14619. Read from package data on each call.
    """
    return json.loads((ASSETS / "published_scores.json").read_text(encoding="utf-8"))
