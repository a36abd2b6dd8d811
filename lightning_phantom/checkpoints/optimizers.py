"""The states of optimizers, keyed by parameter name instead of number: ranks and releases may number them otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.checkpoints.states import is_like, is_whole
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.split import sharded_parameters


def optimizer_to_names(
    module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], gather: Callable[[Tensor, Split | None], Any]
) -> dict[str, Any]:
    """Key an optimizer's state dict by parameter name; `gather(tensor, split)` turns a shard into what is saved."""
    if not state:
        return {}  # of what stands for an optimizer where there is none
    names, sharded = _names(module, optimizer), sharded_parameters(module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved: dict[str, Any] = {}
    for index, parameter in enumerate(params):
        if index in state["state"]:
            split = sharded.get(id(parameter))
            saved[names[id(parameter)]] = {
                # A tensor shaped like its parameter is sharded like it; a step count is not.
                key: gather(value, split) if split and is_like(value, parameter) else value
                for key, value in state["state"][index].items()
            }
    groups = [
        {**group, "params": [names[id(params[index])] for index in group["params"]]} for group in state["param_groups"]
    ]
    return {"state": saved, "param_groups": groups}


def optimizer_from_names(
    module: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any], whole: bool
) -> dict[str, Any]:
    """The inverse of `optimizer_to_names`, keyed by index as `Optimizer.load_state_dict` wants it.

    Args:
        module: the module whose parameters the optimizer holds.
        optimizer: the optimizer that is to load the state.
        saved: what `optimizer_to_names` returned.
        whole: whether the saved tensors are those of all ranks, of which this one takes its share.

    Raises:
        CheckpointError: the checkpoint's optimizer held other parameters.
    """
    names, sharded = _names(module, optimizer), sharded_parameters(module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if held != [group["params"] for group in saved.get("param_groups", [])]:
        raise CheckpointError(
            "the checkpoint's optimizer held other parameters, or in other groups, than this one. Resume with the "
            "configure_optimizers it was saved with, or load the weights alone."
        )
    if not saved:
        return {}
    index = {names[id(p)]: n for n, p in enumerate(params)}
    state: dict[int, Any] = {}
    for name, values in saved["state"].items():
        if name not in index:
            raise CheckpointError(f"the checkpoint is damaged: it has an optimizer state of {name!r}, in no group.")
        parameter = params[index[name]]
        split = sharded.get(id(parameter))
        state[index[name]] = {
            key: split.take(value) if whole and split and is_whole(value, parameter, split) else value
            for key, value in values.items()
        }
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def _names(module: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """The name of each of the optimizer's parameters, by id."""
    names = {id(p): name for name, p in module.named_parameters()}
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise CheckpointError(
            f"{type(optimizer).__name__} holds parameters that the module has no name for; register them in it."
        )
    return names
