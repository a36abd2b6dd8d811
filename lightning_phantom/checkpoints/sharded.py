"""The sharded checkpoint: a torch.distributed.checkpoint directory to which every rank writes its share.

    <name>/current          names the complete version
    <name>/<version>/       tensors as torch.distributed.checkpoint writes them, and
    <name>/<version>/rest.pt  everything else; `format.SavedTensor` stands where a tensor was
    <name>/<version>/checksums.json  of the files beside it

Shards are saved as DTensors of the 2-D mesh, so any number of ranks that divides p can load them, and torch's own tools
see whole tensors under the parameters' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from lightning_phantom.checkpoints.format import OPTIMIZERS, SavedTensor, describe, split_of, with_entry
from lightning_phantom.checkpoints.optimizers import optimizer_to_names
from lightning_phantom.checkpoints.states import KeyPath, held_keys, replace_model_states
from lightning_phantom.checkpoints.versions import checksum
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.split import split_layers

REST = "rest.pt"


class _Held(Tensor):
    """Marks a tensor of which this rank holds a share.

    Attributes:
        split_dim: the dimension along which it is split.
    """

    split_dim: int


def write(
    folder: Path,
    module: nn.Module,
    checkpoint: Mapping[str, Any],
    optimizers: Sequence[Optimizer],
    mesh: DeviceMesh,
    is_writer: bool,
) -> dict[str, int]:
    """Write this rank's share of a checkpoint into `folder`; collective.

    Returns:
        The checksums of the files that this rank has written.
    """
    tensors: dict[str, Tensor] = {}

    def marked(state: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        held = held_keys(module, state)
        whole = {key: _mark(value, held[key]) if key in held else value for key, value in state.items()}
        return dict(_moved_out(whole, "/".join(map(str, path)), tensors, mesh))

    rest = {k: v for k, v in checkpoint.items() if k != "optimizer_states"}
    rest = replace_model_states(module, rest, marked)
    rest = with_entry(rest, describe(module), split=_splits(module))
    if "optimizer_states" in checkpoint:
        states = zip(optimizers, checkpoint["optimizer_states"], strict=True)
        named = [optimizer_to_names(module, o, state, lambda t, split: _mark(t, split)) for o, state in states]
        moved = _moved_out(named, OPTIMIZERS, tensors, mesh)
        rest = {**with_entry(rest, optimizers=moved), "optimizer_states": []}
    save(tensors, storage_writer=FileSystemWriter(folder, sync_files=True))
    files = list(folder.glob(f"__{dist.get_rank()}_*"))
    if is_writer:
        with (folder / REST).open("wb") as file:
            torch.save(rest, file)
        files += [folder / REST, folder / ".metadata"]
    return {file.name: checksum(file) for file in files}


def read_rest(folder: Path, weights_only: bool | None) -> dict[str, Any]:
    """Return a checkpoint without its tensors."""
    return torch.load(folder / REST, weights_only=weights_only is not False)


def read_tensors(folder: Path, rest: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return the checkpoint with this rank's share of each tensor; collective."""
    targets: dict[str, Tensor] = {}
    _visit(rest, lambda saved: targets.update({saved.phantom_tensor: _empty(saved, mesh)}))
    load(targets, storage_reader=FileSystemReader(folder))

    def filled(saved: SavedTensor) -> Tensor:
        tensor = targets[saved.phantom_tensor]
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return dict(_visit(rest, filled))


def check_splits(module: nn.Module, rest: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a layer's shards are of another kind than those that were saved."""
    saved = split_of(rest)
    for name, here in _splits(module).items():
        if saved.get(name, here) != here:
            raise CheckpointError(
                f"{name!r} is split along {saved[name]} in the checkpoint and along {here} in the model; use the style "
                f"it was saved with, or save with state_dict_type='full'."
            )


def _splits(module: nn.Module) -> dict[str, dict[str, int]]:
    return {name: dict(layer.split_dims) for name, layer in split_layers(module).items()}


def _mark(tensor: Tensor, split: Split | None) -> Tensor:
    if split is None:
        return tensor
    held = tensor.detach().as_subclass(_Held)
    held.split_dim = split.dim
    return held


def _moved_out(value: Any, name: str, tensors: dict[str, Tensor], mesh: DeviceMesh) -> Any:
    """Move the tensors of nested dicts and lists into `tensors`, leaving entries that say what stood there."""
    if isinstance(value, Mapping):
        return {k: _moved_out(v, f"{name}/{k}", tensors, mesh) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved_out(v, f"{name}/{n}", tensors, mesh) for n, v in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    dim = value.split_dim if isinstance(value, _Held) else None
    whole = value.detach().as_subclass(Tensor)
    if dim is not None:
        whole = DTensor.from_local(whole, mesh, [Replicate(), Shard(dim)], run_check=False)
    tensors[name] = whole
    return SavedTensor(name, list(whole.shape), whole.dtype, dim)._asdict()


def _empty(saved: SavedTensor, mesh: DeviceMesh) -> Tensor:
    name, shape, dtype, dim = saved
    ranks = mesh.size(1)
    if dim is None:
        # In host memory, where step counts belong; loading copies the others to where they belong.
        return torch.empty(shape, dtype=dtype, device="cpu")
    if shape[dim] % ranks:
        raise CheckpointError(f"{name!r} of shape {shape} does not divide between {ranks} ranks.")
    share = [size // ranks if d == dim else size for d, size in enumerate(shape)]
    local = torch.empty(share, dtype=dtype, device=mesh.device_type)
    return DTensor.from_local(local, mesh, [Replicate(), Shard(dim)], run_check=False)


def _visit(value: Any, replace: Callable[[SavedTensor], Any]) -> Any:
    """Copy nested dicts and lists, with `replace(saved)` in place of what stands for a tensor."""
    saved = SavedTensor.at(value)
    if saved is not None:
        return replace(saved)
    if isinstance(value, Mapping):
        return {k: _visit(v, replace) for k, v in value.items()}
    if isinstance(value, list):
        return [_visit(v, replace) for v in value]
    return value
