"""Where the state dicts of split layers are in a checkpoint, and which of their keys hold shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_phantom.distributed.shards import Split
from lightning_phantom.layers.split import SplitLinear, key_of, split_layers

KeyPath = tuple[str | int, ...]


def held_keys(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, Split]:
    """The keys of a state dict under which this rank's shards are, with how they are split."""
    return {
        base + name: split
        for base, layer in layers_in(module, state).items()
        for name in tensors_of(layer, base, state)
        if (split := layer.split_of(name)) is not None
    }


def layers_in(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, SplitLinear]:
    """The split layers whose shards a state dict holds, by what comes before `weight` in its keys."""

    def holds(base: str, layer: SplitLinear) -> bool:
        own = dict(layer.named_parameters(recurse=False))
        return all(is_like(state.get(base + name), parameter) for name, parameter in own.items())

    return {base: layer for base, layer in layers_named(module, state).items() if holds(base, layer)}


def layers_named(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, SplitLinear]:
    """The split layers that a state dict's keys name, by what comes before `weight` in them.

    A wrapper's state dict (AveragedModel's, say) prefixes the module's own keys. What is a key of the module as it is
    has no prefix, even if its end is one, too: a teacher inside the module has its student's names.
    """
    keys = [key for key in state if isinstance(key, str) and (key == "weight" or key.endswith(".weight"))]
    if not keys:
        return {}
    layers = split_layers(module)
    own = {key_of(name) for name, _ in module.named_parameters(remove_duplicate=False)}
    found: dict[str, SplitLinear] = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[n:]) for n in range(len(parts)))
        owner = next((tail for tail in tails if tail in own), "").removesuffix("weight").removesuffix(".")
        if owner in layers:
            found[key.removesuffix("weight")] = layers[owner]
    return found


def tensors_of(layer: SplitLinear, base: str, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The layer's parameters in a state dict whose keys for them begin with `base`, by their names in the layer."""
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    return {name: state[base + name] for name in names if base + name in state}


def replace_model_states(
    module: nn.Module, value: Any, replace: Callable[[Mapping[str, Any], KeyPath], Any], path: KeyPath = ()
) -> Any:
    """Copy nested dicts and lists, with `replace(state, path)` in place of each state dict of split layers."""
    if isinstance(value, Mapping) and layers_in(module, value):
        return replace(value, path)
    if type(value) is dict:
        return {k: replace_model_states(module, v, replace, (*path, k)) for k, v in value.items()}
    if type(value) is list:
        return [replace_model_states(module, v, replace, (*path, n)) for n, v in enumerate(value)]
    return value


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether `value` is a tensor of the parameter's shape."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def is_whole(value: Any, parameter: Tensor, split: Split) -> bool:
    """Whether `value` is a tensor of the shape that the parameter has on all ranks together."""
    return isinstance(value, Tensor) and list(value.shape) == split.whole_shape(parameter)
