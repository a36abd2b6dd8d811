"""The full checkpoint: one file that any strategy can load weights from, and that the strategy that saved it resumes.

`state_dict`, and every other state dict of the model that a callback has put into the checkpoint (an average, say),
holds dense weights under the module's own keys. Beside them, `"phantom"` holds what training needs to go on:

    version         1
    method          "phantom" (also where there is none) or "tensor_parallel"
    num_blocks      p, of phantom layers
    layers          {name: {"in_features", "out_features", "bias", "phantom_width" of phantom layers,
                    "transposed" where dense weights are [in, out]}}
    factors         of phantom layers: [{"path": [keys down to a state dict], "tensors": {key: all ranks'}}, ...]
    optimizers      per optimizer: {"state": {parameter name: ...}, "param_groups": [...]}, of all ranks
    rng             per replica: the states of its random number generators

Saving is collective within one group of ranks; its first one holds one gathered tensor at a time beside what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.dense import oriented
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear, key_of, sharded_parameters, split_layers

VERSION = 1
Path = tuple[str | int, ...]


def describe(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the module that loads it."""
    layers = split_layers(module)
    first = next(iter(layers.values()))
    blocks = {"num_blocks": first.num_blocks} if isinstance(first, PhantomLinear) else {}
    records = {name: layer.record() for name, layer in layers.items()}
    return {"version": VERSION, "method": first.method, **blocks, "layers": records}


def method_of(checkpoint: Mapping[str, Any]) -> str | None:
    """The strategy's name that saved a checkpoint; None for a dense one."""
    saved = checkpoint.get("phantom")
    return None if saved is None else saved.get("method", "phantom")


def make_full(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with dense weights in place of this rank's shards, and all ranks' factors beside them.

    What comes back is whole on the first rank of the group only. The given checkpoint is not changed.
    """
    factors: list[dict[str, Any]] = []

    def densified(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
        dense, tensors = _gather_state(module, state)
        if tensors:
            factors.append({"path": list(path), "tensors": tensors})
        return dense

    whole = replace_model_states(module, checkpoint, densified)
    return {**whole, "phantom": {**describe(module), "factors": factors}}


def take_share(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint with this rank's factors in place of the dense weights that stand for them.

    Weights that are the layers' own stay whole: the layers take their share when they load them.
    """
    local = dict(checkpoint)
    for entry in checkpoint["phantom"]["factors"]:
        target: Any = local
        for key in entry["path"]:  # copy on the way down: the caller's dicts stay as they are
            target[key] = dict(target[key]) if isinstance(target[key], Mapping) else list(target[key])
            target = target[key]
        for base, layer in _layers_named(module, entry["tensors"]).items():
            for name, tensor in _tensors_of(layer, base, entry["tensors"]).items():
                target[base + name] = layer.share_of(name, tensor)
    return local


def held_keys(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, Split]:
    """The keys of a state dict under which this rank's shards are, with how they are split."""
    return {
        base + name: split
        for base, layer in layers_in(module, state).items()
        for name in _tensors_of(layer, base, state)
        if (split := layer.split_of(name)) is not None
    }


def layers_in(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, SplitLinear]:
    """The split layers whose shards a state dict holds, by what comes before `weight` in its keys."""

    def holds(base: str, layer: SplitLinear) -> bool:
        own = dict(layer.named_parameters(recurse=False))
        return all(_like(state.get(base + name), parameter) for name, parameter in own.items())

    return {base: layer for base, layer in _layers_named(module, state).items() if holds(base, layer)}


def _layers_named(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, SplitLinear]:
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


def _tensors_of(layer: SplitLinear, base: str, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    return {name: state[base + name] for name in names if base + name in state}


def replace_model_states(
    module: nn.Module, value: Any, replace: Callable[[Mapping[str, Any], Path], Any], path: Path = ()
) -> Any:
    """Copy nested dicts and lists, with `replace(state, path)` in place of each state dict of split layers."""
    if isinstance(value, Mapping) and layers_in(module, value):
        return replace(value, path)
    if type(value) is dict:
        return {k: replace_model_states(module, v, replace, (*path, k)) for k, v in value.items()}
    if type(value) is list:
        return [replace_model_states(module, v, replace, (*path, n)) for n, v in enumerate(value)]
    return value


def _gather_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split one state dict of the model into dense weights and, where those are not the layers' own, all factors."""
    layers = layers_in(module, state)
    held = {base + name for base, layer in layers.items() for name in _tensors_of(layer, base, state)}
    dense: dict[str, Any] = {}
    factors: dict[str, Tensor] = {}
    for key, value in state.items():
        base = key.removesuffix("weight")
        if key not in held:
            dense[key] = value
        elif base in layers:  # a layer's parameters are gathered together, at its weight
            layer = layers[base]
            gathered = {n: gather_whole(t, layer.split_of(n)) for n, t in _tensors_of(layer, base, state).items()}
            whole = {name: tensor for name, tensor in gathered.items() if tensor is not None}
            if len(whole) == len(gathered):
                dense[key] = oriented(layer.dense_from(whole), layer.dense_class).contiguous()
                if "bias" in whole:
                    dense[f"{base}bias"] = whole["bias"]
                if isinstance(layer, PhantomLinear):
                    factors.update({base + name: tensor for name, tensor in whole.items()})
    return dense, factors


def optimizer_to_names(
    module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], gather: Callable[[Tensor, Split | None], Any]
) -> dict[str, Any]:
    """Key an optimizer's state dict by parameter name; `gather(tensor, split)` turns a shard into what is saved."""
    names, sharded = _names(module), sharded_parameters(module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved: dict[str, Any] = {}
    for index, parameter in enumerate(params):
        if index in state["state"]:
            split = sharded.get(id(parameter))
            saved[names[id(parameter)]] = {
                # A tensor shaped like its parameter is sharded like it; a step count is not.
                key: gather(value, split) if split and _like(value, parameter) else value
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
    names, sharded = _names(module), sharded_parameters(module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if held != [group["params"] for group in saved["param_groups"]]:
        raise CheckpointError(
            "the checkpoint's optimizer held other parameters, or in other groups, than this one. Resume with the "
            "configure_optimizers it was saved with, or load the weights alone."
        )
    index = {names[id(p)]: n for n, p in enumerate(params)}
    state: dict[int, Any] = {}
    for name, values in saved["state"].items():
        parameter = params[index[name]]
        split = sharded.get(id(parameter))
        state[index[name]] = {
            key: split.take(value) if whole and split and _is_whole(value, parameter, split) else value
            for key, value in values.items()
        }
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def check_fits(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint is dense or was saved from the same layers by the same method."""
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise CheckpointError("this is not a Lightning checkpoint: it has no 'state_dict'.")
    saved = checkpoint.get("phantom")
    if saved is None:
        return
    if saved.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {saved.get('version')!r}, this release reads {VERSION}; upgrade."
        )
    here = describe(module)
    if method_of(checkpoint) != here["method"]:
        raise CheckpointError(
            f"the checkpoint was saved by strategy={method_of(checkpoint)!r} in shards, which this strategy, "
            f"{here['method']!r}, cannot read: load it there and save it with state_dict_type='full'."
        )
    if saved.get("num_blocks") != here.get("num_blocks"):
        raise CheckpointError(
            f"the checkpoint was saved with num_blocks={saved['num_blocks']}, the model has num_blocks="
            f"{here['num_blocks']}: set num_blocks={saved['num_blocks']}; any number of ranks that divides it will do."
        )
    kind = "phantom" if here["method"] == "phantom" else "tensor-parallel"
    for name in dict.fromkeys([*saved["layers"], *here["layers"]]):
        theirs, ours = saved["layers"].get(name), here["layers"].get(name)
        if theirs is None or ours is None:
            where = "the model" if theirs is None else "the checkpoint"
            raise CheckpointError(f"{name!r} is a {kind} layer only in {where}; use the plan it was saved with.")
        for key in theirs:
            if theirs[key] != ours[key]:
                raise CheckpointError(
                    f"{name!r} has {key}={theirs[key]} in the checkpoint and {key}={ours[key]} in the model; resume "
                    f"with the {'phantom_width' if key == 'phantom_width' else 'module'} it was saved with."
                )
    for entry in saved.get("factors", []):
        for base, layer in _layers_named(module, entry["tensors"]).items():
            for name, parameter in layer.named_parameters(recurse=False):
                tensor, split = entry["tensors"].get(base + name), layer.split_of(name)
                if tensor is None or (split is not None and not _is_whole(tensor, parameter, split)):
                    found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    raise CheckpointError(f"the checkpoint is damaged: {base + name!r} is {found}.")


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_whole(value: Any, parameter: Tensor, split: Split) -> bool:
    return isinstance(value, Tensor) and list(value.shape) == split.whole_shape(parameter)


def gather_whole(tensor: Tensor, split: Split | None) -> Tensor | None:
    """The tensor of all ranks on the group's first one, in host memory."""
    return tensor.cpu() if split is None else split.gather_to_first(tensor)
