"""CoreNet's training checkpoints, `training_checkpoint_*.pt`: the weights, AdamW's moments and the iteration.

A dictionary of `iterations`, `epoch`, `best_metric`, `model_state_dict`, and `optim_state_dict` as PyTorch's optimizers
give it. Parameters are numbered, first the matrices (which decay), then the vectors, each in the order in which the
model has them; a sharded run names them instead (corenet/utils/checkpoint_utils.py, corenet/modeling/misc/common.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from . import torch_file
from .corenet import hub_name, plain_names
from .safetensors import Tensor
from .torch_tensors import StoredTensor

_OPTIMIZER, _MODEL = "optim_state_dict", "model_state_dict"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingState:
    """The state of a training run beside its weights.

    Args:
        iteration: the next one to do, from which the learning rate follows.
        updates: those done, from which Adam's bias correction follows.
        moments: Adam's averages of gradients and of squared gradients by Hugging Face name of the parameter, unread.
    """

    iteration: int
    updates: int
    moments: dict[str, tuple[Tensor, Tensor]]


def has_training_state(path: Path) -> bool:
    """Whether a `.pt` file holds an optimizer's state.

    Raises:
        RequestError: the file is damaged or contains code.
    """
    state = torch_file.read(path)
    return isinstance(state, dict) and isinstance(state.get(_OPTIMIZER), dict)


def read(path: Path) -> TrainingState:
    """The optimizer's state and the iteration of a training checkpoint.

    Raises:
        RequestError: it is damaged, of another optimizer, or does not fit its own weights.
    """
    content = torch_file.read(path)
    weights, optimizer, done = content.get(_MODEL), content.get(_OPTIMIZER), content.get("iterations")
    if not isinstance(weights, dict) or not isinstance(optimizer, dict) or type(done) is not int or done < 0:
        raise RequestError(
            f"{path} is not a training checkpoint of CoreNet: it lacks weights, optimizer or iterations."
        )
    weights, states = plain_names(weights), optimizer.get("state")
    if not isinstance(states, dict):
        raise _unfit(path, "it has no state")
    by_name: dict[str, Mapping[str, Any]] = {}
    for name, key in _keys(path, weights, optimizer).items():
        state = states.get(key)
        if not isinstance(state, dict) or not all(isinstance(state.get(part), StoredTensor) for part in _MOMENTS):
            raise _unfit(path, f"it has no moments of {name}; only AdamW's checkpoints can be continued")
        if any(state[part].shape != weights[name].shape for part in _MOMENTS):
            raise _unfit(path, f"the moments of {name} have another shape")
        by_name[name] = state
    stored = {f"{part} {name}": state[part] for name, state in by_name.items() for part in _MOMENTS}
    read = torch_file.tensors(path, stored)
    moments = {hub_name(name): (read[f"exp_avg {name}"], read[f"exp_avg_sq {name}"]) for name in by_name}
    # CoreNet counts an iteration before it saves, and continues with the one after.
    return TrainingState(done + 1, _updates(path, next(iter(by_name.values())).get("step")), moments)


def _keys(path: Path, weights: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, int | str]:
    """The key of each parameter in the optimizer's state."""
    groups = optimizer.get("param_groups")
    listed = [group.get("params") if isinstance(group, dict) else None for group in groups or ()]
    if not listed or not all(isinstance(params, list) for params in listed):
        raise _unfit(path, "it has no groups of parameters")
    keys: list[Any] = [key for params in listed for key in params]  # type: ignore[union-attr]
    if all(isinstance(key, str) for key in keys):
        found = plain_names({key: key for key in keys})
    else:
        dimensions = {name: len(tensor.shape) for name, tensor in weights.items()}
        names = [name for name, count in dimensions.items() if count != 1]
        if len(listed) > 1:
            names += [name for name, count in dimensions.items() if count == 1]
        else:
            names = list(weights)
        found = dict(zip(names, keys, strict=False)) if len(names) == len(keys) else {}
    if found.keys() != weights.keys():
        raise _unfit(path, f"it has {len(keys)} parameters, and the model {len(weights)}")
    return found


def _updates(path: Path, step: Any) -> int:
    """The number of updates, which newer versions of PyTorch store as a tensor."""
    if isinstance(step, StoredTensor):
        step = torch_file.tensors(path, {"step": step})["step"].read().item()
    if not isinstance(step, int | float) or step != step // 1 or step < 0:
        raise _unfit(path, f"its step is {quote(step)}")
    return int(step)


def _unfit(path: Path, why: str) -> RequestError:
    return RequestError(f"The optimizer's state in {path} cannot be used: {why}.")
