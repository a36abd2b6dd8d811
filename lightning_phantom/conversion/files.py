"""Checkpoint files as conversions read and write them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_phantom.checkpoints.files import AtomicCheckpointIO, check_records
from lightning_phantom.errors import CheckpointError
from lightning_phantom.plan.record import Plan


def read(path: Path, trust: bool) -> dict[str, Any]:
    """Read a checkpoint of this package, of Lightning or a bare state dict; its tensors stay in the file until used.

    Args:
        path: the file.
        trust: whether it may hold any pickled object, which runs its code.

    Raises:
        CheckpointError: it cannot be read or is no checkpoint.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path}: a directory. Of a sharded checkpoint make one file first: load it in a run with "
            f"PhantomStrategy(state_dict_type='full') and save it."
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        check_records(path)
        # Only the present format can stay in its file.
        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values, or is no checkpoint. If you know where it comes from, "
            f"--trust reads it all the same. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read; it is truncated or no checkpoint. ({error})") from error
    if isinstance(loaded, Mapping) and loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        loaded = {"state_dict": loaded}
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("state_dict"), Mapping):
        raise CheckpointError(f"{path}: this is neither a state dict nor a Lightning checkpoint with a 'state_dict'.")
    return dict(loaded)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as one file, or leave what is there."""
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


def check_state(module: nn.Module, state: Mapping[str, Tensor], plan: Plan) -> None:
    """Raise CheckpointError unless the state dict has the module's keys and shapes, or at least the planned layers'."""
    ours = module.state_dict()
    strict = getattr(module, "strict_loading", True)
    planned = {layer.name for layer in plan.swapped}
    problems = {
        "missing from the checkpoint": [
            key for key in ours if key not in state and (strict or key.rpartition(".")[0] in planned)
        ],
        "unknown to the module": [key for key in state if key not in ours] if strict else [],
        "of another shape": [
            f"{key} {list(state[key].shape)}, not {list(value.shape)}"
            for key, value in ours.items()
            if isinstance(value, Tensor) and key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{what}: {', '.join(keys[:4])}{', ...' * (len(keys) > 4)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"the checkpoint does not fit {type(module).__name__} as the config makes it; {'; '.join(found)}."
        )
