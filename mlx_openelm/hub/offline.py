"""What to do without a network: the commands for a machine that has one, and what to do with their files here."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from contextvars import ContextVar

from ..errors import command_or_call
from . import catalog

_denied: ContextVar[str | None] = ContextVar("_denied", default=None)

_ELSEWHERE = "on a machine with a network"


@contextlib.contextmanager
def no_network(reason: str) -> Iterator[None]:
    """A block in which nothing is downloaded: what is not on this machine is an error that begins with `reason`."""
    token = _denied.set(reason)
    try:
        yield
    finally:
        _denied.reset(token)


def denied() -> str | None:
    """Why nothing may be downloaded; None if the network may be used."""
    return _denied.get()


def command(repo: str, folder: str, *files: str, revision: str | None = None) -> str:
    """The command that downloads a repository, or some of its files, into a folder; in backquotes."""
    words = ["hf", "download", repo, *files, *(["--revision", revision] if revision else []), "--local-dir", folder]
    return f"`{shlex.join(words)}`"


def tokenizer_command(folder: str) -> str:
    """The command that downloads the tokenizer of all published models into a folder; in backquotes."""
    return command(catalog.TOKENIZER_REPO, folder, "tokenizer.model")


def model(repo: str, revision: str | None = None) -> str:
    """How to get a model; of Apple's repositories, which lack it, the tokenizer too."""
    folder = repo.rpartition("/")[2]
    commands = command(repo, folder, revision=revision)
    if catalog.find_repo(repo) is not None:
        commands += f" and {tokenizer_command(folder)}"
    return f"run {commands} {_ELSEWHERE}, copy the folder here and {_give_model(folder)}"


def adapter(repo: str, revision: str | None = None) -> str:
    """How to get an adapter."""
    folder = repo.rpartition("/")[2]
    get = command(repo, folder, revision=revision)
    return f"run {get} {_ELSEWHERE}, copy the folder here and {_give_adapter(folder)}"


def tokenizer() -> str:
    """How to get the tokenizer of all published models."""
    folder = catalog.TOKENIZER_REPO.rpartition("/")[2]
    file = f"{folder}/tokenizer.model"
    given = command_or_call(f"--tokenizer {file}", f'`tokenizer="{file}"`')
    return f"run {tokenizer_command(folder)} {_ELSEWHERE}, and give that file, or a copy of it, with {given}"


def data_set(name: str) -> str:
    """How to get a data set: through the cache, since its folders may be of any layout."""
    from huggingface_hub import constants

    folder = f"datasets--{name.replace('/', '--')}"
    return (
        f"run `{shlex.join(['hf', 'download', name, '--repo-type', 'dataset'])}` {_ELSEWHERE}, "
        f"and copy ~/.cache/huggingface/hub/{folder} from there into {constants.HF_HUB_CACHE}"
    )


def corenet(name: str) -> str:
    """How to get what `corenet:SIZE/NAME` stands for."""
    files = catalog.corenet_files(name)
    folder = "OpenELM-" + (catalog.corenet_name(name) or name).partition("/")[0]
    urls = [f"{catalog.CORENET_URL}/{file}" for file in files]
    place = f"{folder}/{files[0].rpartition('/')[2]}" if len(files) == 1 else folder
    get = f"`{shlex.join(['curl', '-fL', '--create-dirs', '--output-dir', folder, '--remote-name-all', *urls])}`"
    if files[0].startswith("peft/"):
        return f"run {get} {_ELSEWHERE}, copy the folder here and {_give_adapter(place)}"
    get = f"{get} and {tokenizer_command(folder)}"
    return f"run {get} {_ELSEWHERE}, copy the folder here and {_give_model(place)}"


def _give_model(path: str) -> str:
    tiny = catalog.TINY
    return command_or_call(
        f"give it with --model {path}; --model {tiny} needs no network",
        f'give its path, as in `load("{path}")`; `load("{tiny}")` needs no network',
    )


def _give_adapter(path: str) -> str:
    return "give it with " + command_or_call(f"--adapter-path {path}", f'`adapter_path="{path}"`')
