"""Adapters in files: reads and writes mlx-lm's and PEFT's formats, and reads CoreNet's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..formats import mlx_adapter, peft
from ..formats.adapter import CONFIG, FILES, Adapter
from ..hub import catalog, offline
from ..hub.resolve import download
from ..inputs import check_file, read_json, to_path

FORMATS = {"mlx": mlx_adapter, "peft": peft}
_TORCH_SUFFIXES, _SAFETENSORS = (".pt", ".pth"), ".safetensors"


def read_adapter(
    path: str | Path, config: ModelConfig, *, revision: str | None = None, alpha: float | None = None
) -> Adapter:
    """The adapter at `path`, in any of the formats, checked against the model it is for.

    Args:
        path: a folder, a `.safetensors` file beside its `adapter_config.json`, a `.pt` file of CoreNet's, a hub
            repository (`owner/name`), or Apple's `corenet:SIZE/lora` or `/dora`.
        config: the model's.
        revision: a branch, tag or commit on the hub.
        alpha: that of a CoreNet adapter, whose files do not state it; by default its rank.

    Raises:
        RequestError: no adapter there, damaged files, or one that does not match the model or is not supported.
        OpenELMError: a download that failed.
    """
    found = _find(path, revision)
    if found.suffix.lower() in _TORCH_SUFFIXES and not found.is_dir():
        from ..formats import corenet_adapter

        return _checked(corenet_adapter.read(found, config, alpha), found)
    if alpha is not None:
        raise RequestError(f"{path} states its own alpha; give one only with CoreNet's .pt files.")
    if found.is_file() and found.suffix.lower() != _SAFETENSORS:
        raise RequestError(f"{found} is not an adapter: give its folder, a {_SAFETENSORS} file in it, or a .pt file.")
    folder = found if found.is_dir() else found.parent
    check_adapter_folder(folder)
    format = peft if "peft_type" in read_json(folder / CONFIG) else mlx_adapter
    file = found if found.is_file() else folder / format.WEIGHTS
    if not file.is_file():
        pickled = ""
        if format is peft:
            pickled = "; a pickled adapter_model.bin is never read: load it in PEFT and save it again, as safetensors"
        raise RequestError(f"{folder} has no {file.name}{pickled}.")
    return _checked(format.read(file, config), file)


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder without the configuration that an adapter's folder has; files are left to `read_adapter`."""
    if folder.is_dir() and not (folder / CONFIG).is_file():
        raise RequestError(f"{folder} has no {CONFIG}, so it is not an adapter; give {_folders_in(folder)}.")


def write_adapter(
    adapter: Adapter, folder: Path, config: ModelConfig, format: str = "mlx", base_model: str | None = None
) -> None:
    """Write an adapter's files into a folder that exists.

    Args:
        format: `mlx` (mlx-lm's) or `peft`.
        base_model: the name of its base model in the files; by default the adapter's own.

    Raises:
        RequestError: an unknown format, or one that cannot store the adapter.
    """
    if format not in FORMATS:
        raise RequestError(f"--adapter-format must be one of {', '.join(FORMATS)}, got {quote(format)}.")
    FORMATS[format].write(adapter, folder, config, base_model)


def _folders_in(folder: Path) -> str:
    """What to give in place of a folder that is not an adapter: PEFT saves each adapter of a model in a subfolder."""
    names = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    return f"one of the folders in it: {', '.join(names[:5])}" if names else "the folder of one"


def _checked(adapter: Adapter, file: Path) -> Adapter:
    if not adapter.modules and not adapter.weights:
        raise RequestError(f"{file} is not an adapter: nothing in it changes the model.")
    # Read now: they are small, and the file may be overwritten later. Whole weights are read one at a time.
    mx.eval([(change.a, change.b, change.magnitude) for change in adapter.modules.values()])
    for path, change in adapter.modules.items():
        parts = (change.a, change.b, change.magnitude)
        if not all(part is None or mx.all(mx.isfinite(part)).item() for part in parts):
            raise RequestError(f"{file} has values for {path} that are not finite; its training diverged.")
    return adapter


def find_local(name: str) -> Path | None:
    """The local file or folder of this name, or None.

    Raises:
        RequestError: the file system cannot look it up.
    """
    path = to_path(name)
    try:
        return path if path.exists() else None
    except OSError as error:
        raise RequestError(f"{quote(name)} cannot be read: {error.strerror}.") from None


def _find(path: str | Path, revision: str | None) -> Path:
    """The local file or folder, downloaded if need be."""
    text = str(path).strip()
    if catalog.corenet_name(path) is not None:
        from ..hub import corenet

        return corenet.download(text)
    local = find_local(text) if text else None
    if local is not None:
        if not local.is_dir():
            check_file(local)
        if revision is not None:
            raise RequestError(f"{path} is not a hub repository, so it has no revision {quote(revision)}.")
        return local
    owner, _, name = text.partition("/")
    is_repo = owner.strip(".~") and name and "/" not in name and not isinstance(path, Path)
    if not is_repo or Path(text).suffix.lower() in (*_TORCH_SUFFIXES, _SAFETENSORS):
        raise RequestError(
            f"There is no adapter {quote(text)}: adapters are folders, .safetensors or .pt files, or hub repositories."
        )
    return download(text, revision=revision, patterns=FILES, advice=offline.adapter(text, revision))
