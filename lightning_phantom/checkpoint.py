"""The full checkpoint: one file that any strategy can load weights from, and that phantom can resume from.

`state_dict`, and every other state dict of the model that a callback has put into the checkpoint (an average, say),
holds dense weights under the module's own keys. Beside them, `"phantom"` holds what training needs to go on:

    version         1
    num_blocks      p
    layers          {name: {"in_features", "out_features", "phantom_width", "bias"}}
    factors         [{"path": [keys down to a state dict], "tensors": {key: the parameter of all ranks}}, ...]
    optimizers      per optimizer: {"state": {parameter name: ...}, "param_groups": [...]}, of all ranks
    rng             per replica: the states of its random number generators

Saving is collective within one phantom group; its first rank holds one gathered tensor at a time beside what it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_phantom.comm import Ranks
from lightning_phantom.convert import Factors, to_dense
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers import PhantomLinear, phantom_layers, sharded_parameters
from lightning_phantom.linears import oriented

VERSION = 1
FACTORS = ("weight", "compressor_weight", "decompressor_weight", "bias")
Path = tuple[str | int, ...]


def describe(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the module that loads it."""
    layers = phantom_layers(module)
    return {
        "version": VERSION,
        "num_blocks": next(iter(layers.values())).num_blocks,
        "layers": {
            name: {
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "phantom_width": layer.phantom_width,
                "bias": layer.bias is not None,
            }
            for name, layer in layers.items()
        },
    }


def make_full(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with dense weights in place of this rank's shards, and all ranks' factors beside them.

    What comes back is whole on the first rank of the phantom group only. The given checkpoint is not changed.
    """
    factors: list[dict[str, Any]] = []

    def densified(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
        dense, tensors = _gather_state(module, state)
        factors.append({"path": list(path), "tensors": tensors})
        return dense

    whole = replace_model_states(module, checkpoint, densified)
    return {**whole, "phantom": {**describe(module), "factors": factors}}


def take_share(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint with this rank's shards in place of the dense weights."""
    local = dict(checkpoint)
    for entry in checkpoint["phantom"]["factors"]:
        target: Any = local
        for key in entry["path"]:  # copy on the way down: the caller's dicts stay as they are
            target[key] = dict(target[key]) if isinstance(target[key], Mapping) else list(target[key])
            target = target[key]
        for base, layer in layers_in(module, entry["tensors"]).items():
            for factor in FACTORS:
                if base + factor in entry["tensors"]:
                    target[base + factor] = slice_whole(entry["tensors"][base + factor], layer.ranks)
    return local


def layers_in(module: nn.Module, state: Mapping[Any, Any]) -> dict[str, PhantomLinear]:
    """The phantom layers whose parameters a state dict holds, by what comes before `weight` in its keys.

    A wrapper's state dict (AveragedModel's, say) prefixes the module's own keys.
    """
    layers = phantom_layers(module)
    mark = "compressor_weight"
    found: dict[str, PhantomLinear] = {}
    for key in state:
        if isinstance(key, str) and key.endswith(mark):
            base = key.removesuffix(mark)
            names = [name for name in layers if f".{base}".endswith(f".{name}." if name else ".")]
            if names:
                found[base] = layers[max(names, key=len)]
    return found


def replace_model_states(
    module: nn.Module, value: Any, replace: Callable[[Mapping[str, Any], Path], Any], path: Path = ()
) -> Any:
    """Copy nested dicts and lists, with `replace(state, path)` in place of each state dict of phantom layers."""
    if isinstance(value, Mapping) and layers_in(module, value):
        return replace(value, path)
    if type(value) is dict:
        return {k: replace_model_states(module, v, replace, (*path, k)) for k, v in value.items()}
    if type(value) is list:
        return [replace_model_states(module, v, replace, (*path, n)) for n, v in enumerate(value)]
    return value


def _gather_state(module: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split one state dict of the model into dense weights and the factors of all ranks."""
    bases = layers_in(module, state)
    held = {base + factor for base in bases for factor in FACTORS}
    dense: dict[str, Any] = {}
    factors: dict[str, Tensor] = {}
    for key, value in state.items():
        base = key.removesuffix("weight")
        if key not in held:
            dense[key] = value
        elif base in bases:  # a layer's parameters are gathered together, at its weight
            ranks = bases[base].ranks
            gathered = {f: gather_whole(state[base + f], ranks) for f in FACTORS if base + f in state}
            whole = {f: tensor for f, tensor in gathered.items() if tensor is not None}
            if whole:
                factors.update({base + f: tensor for f, tensor in whole.items()})
                weight = to_dense(Factors(*(whole[f] for f in FACTORS[:3])), bases[base].num_blocks)
                dense[key] = oriented(weight, bases[base].dense_class).contiguous()
                if "bias" in whole:
                    dense[f"{base}bias"] = whole["bias"]
    return dense, factors


def optimizer_to_names(
    module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], gather: Callable[[Tensor, Ranks], Any]
) -> dict[str, Any]:
    """Key an optimizer's state dict by parameter name; `gather(tensor, ranks)` turns a shard into what is saved."""
    names, sharded = _names(module), sharded_parameters(module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved: dict[str, Any] = {}
    for index, parameter in enumerate(params):
        if index in state["state"]:
            ranks = sharded.get(id(parameter))
            saved[names[id(parameter)]] = {
                # A tensor shaped like its parameter is sharded like it; a step count is not.
                key: gather(value, ranks) if ranks and _like(value, parameter) else value
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
        ranks = sharded.get(id(parameter))
        state[index[name]] = {
            key: slice_whole(value, ranks) if whole and ranks and _is_whole(value, parameter, ranks) else value
            for key, value in values.items()
        }
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def check_fits(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint is dense or was saved from the same phantom layers."""
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
    if saved["num_blocks"] != here["num_blocks"]:
        raise CheckpointError(
            f"the checkpoint was saved with num_blocks={saved['num_blocks']}, the model has num_blocks="
            f"{here['num_blocks']}: set num_blocks={saved['num_blocks']}; any number of ranks that divides it will do."
        )
    for name in dict.fromkeys([*saved["layers"], *here["layers"]]):
        theirs, ours = saved["layers"].get(name), here["layers"].get(name)
        if theirs is None or ours is None:
            where = "the model" if theirs is None else "the checkpoint"
            raise CheckpointError(f"{name!r} is a phantom layer only in {where}; use the plan it was saved with.")
        for key in theirs:
            if theirs[key] != ours[key]:
                raise CheckpointError(
                    f"{name!r} has {key}={theirs[key]} in the checkpoint and {key}={ours[key]} in the model; resume "
                    f"with the {'phantom_width' if key == 'phantom_width' else 'module'} it was saved with."
                )
    for entry in saved.get("factors", []):
        for base, layer in layers_in(module, entry["tensors"]).items():
            for factor in FACTORS:
                tensor, parameter = entry["tensors"].get(base + factor), getattr(layer, factor)
                if parameter is not None and (tensor is None or not _is_whole(tensor, parameter, layer.ranks)):
                    found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    raise CheckpointError(f"the checkpoint is damaged: {base + factor!r} is {found}.")


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_whole(value: Any, parameter: Tensor, ranks: Ranks) -> bool:
    return isinstance(value, Tensor) and value.shape == (parameter.shape[0] * ranks.size, *parameter.shape[1:])


def gather_whole(tensor: Tensor, ranks: Ranks) -> Tensor | None:
    """The shards stacked on the group's first rank, in host memory."""
    whole = ranks.gather_to_first(tensor)
    return None if whole is None else whole.cpu()


def slice_whole(tensor: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of a tensor of all ranks."""
    return tensor[ranks.slice_of(tensor.shape[0])]
