"""The full checkpoint: one file that any strategy can load weights from, and that the strategy that saved it resumes.

Saving is collective within one group of ranks; its first one holds one gathered tensor at a time beside what it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.checkpoints.format import SavedFactors, describe, factors_of, with_entry
from lightning_phantom.checkpoints.optimizers import optimizer_to_names
from lightning_phantom.checkpoints.states import KeyPath, layers_in, layers_named, replace_model_states, tensors_of
from lightning_phantom.distributed.shards import Split
from lightning_phantom.layers.activation import version_of
from lightning_phantom.layers.dense import oriented

StandIns = dict[KeyPath, tuple[Tensor, Any]]


def make_full(module: nn.Module, checkpoint: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Return the checkpoint with dense weights in place of this rank's shards, and all ranks' factors beside them.

    A layer that no dense weight stands for (it reads latents of another) has its factors in both places.

    What comes back is whole on the first rank of the group only. The given checkpoint is not changed.
    """
    factors: list[SavedFactors] = []

    def densified(state: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        dense, tensors = _gather_state(module, state)
        if tensors:
            factors.append(SavedFactors(list(path), tensors))
        return dense

    whole = with_entry(replace_model_states(module, checkpoint, densified), describe(module), factors=factors)
    if "optimizer_states" not in checkpoint:
        return whole
    states = zip(optimizers, checkpoint["optimizer_states"], strict=True)
    named = [optimizer_to_names(module, optimizer, state, _gather_whole) for optimizer, state in states]
    return {**with_entry(whole, optimizers=named), "optimizer_states": []}


def stand_ins(checkpoint: Mapping[str, Any]) -> StandIns:
    """The tensors of a full checkpoint that stand for factors, by path and key, as they are now."""
    found: StandIns = {}
    for entry in factors_of(checkpoint):
        state = _at(checkpoint, entry.path)
        for key in entry.tensors:
            tensor, place = state.get(key), (*entry.path, key)
            if isinstance(tensor, Tensor):
                found[place] = tensor, version_of(tensor)
    return found


def take_share(module: nn.Module, checkpoint: Mapping[str, Any], as_read: StandIns | None = None) -> dict[str, Any]:
    """Return a full checkpoint with this rank's factors in place of the dense weights that stand for them.

    Weights that are the layers' own stay whole: the layers take their share when they load them. So do those that are
    not what they were `as_read` any more, and stand for nothing but themselves.
    """
    local = dict(checkpoint)
    changed = set() if as_read is None else _changed(as_read, stand_ins(checkpoint))
    for entry in factors_of(checkpoint):
        if not _at(checkpoint, entry.path):
            continue  # somebody has taken it out
        target: Any = local
        for key in entry.path:  # copy on the way down: the caller's dicts stay as they are
            target[key] = dict(target[key]) if isinstance(target[key], Mapping) else list(target[key])
            target = target[key]
        for base, layer in layers_named(module, entry.tensors).items():
            weight = f"{base}weight"
            if layer.has_dense_weight and (*entry.path, weight) in changed:
                rank_zero_warn(f"{weight!r} was changed after it was read: {layer.kind} factors are found anew.")
                continue
            for name, tensor in tensors_of(layer, base, entry.tensors).items():
                if (*entry.path, base + name) not in changed:
                    target[base + name] = layer.share_of(name, tensor)
                elif base + name in target:  # a bias of the user's
                    target[base + name] = layer.local_state(None, target[base + name])[name]
    return local


def _changed(before: StandIns, now: StandIns) -> set[KeyPath]:
    absent = None, None
    return {
        key
        for key, (tensor, version) in before.items()
        if now.get(key, absent)[0] is not tensor or now[key][1] != version
    }


def _at(value: Any, path: Iterable[str | int]) -> Mapping[str, Any]:
    """The dict at a path of nested dicts and lists; an empty one if it is not there."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _gather_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split one state dict of the model into dense weights and, where those alone do not restore it, all factors."""
    layers = layers_in(module, state)
    held = {base + name for base, layer in layers.items() for name in tensors_of(layer, base, state)}
    dense: dict[str, Any] = {}
    factors: dict[str, Tensor] = {}
    for key, value in state.items():
        base = key.removesuffix("weight")
        if key not in held:
            dense[key] = value
        elif base in layers:  # a layer's parameters are gathered together, at its weight
            layer = layers[base]
            gathered = {n: _gather_whole(t, layer.split_of(n)) for n, t in tensors_of(layer, base, state).items()}
            whole = {name: tensor for name, tensor in gathered.items() if tensor is not None}
            if len(whole) == len(gathered):
                if layer.has_dense_weight:
                    dense[key] = oriented(layer.dense_from(whole), layer.dense_class).contiguous()
                    if "bias" in whole:
                        dense[f"{base}bias"] = layer.bias_from(whole["bias"])
                else:  # no dense module may take what it would compute something else with
                    dense.update({base + name: tensor for name, tensor in whole.items()})
                if layer.keeps_factors:
                    factors.update({base + name: tensor for name, tensor in whole.items()})
    return dense, factors


def _gather_whole(tensor: Tensor, split: Split | None) -> Tensor | None:
    """The tensor of all ranks on the group's first one, in host memory."""
    return tensor.cpu() if split is None else split.gather_to_first(tensor)
