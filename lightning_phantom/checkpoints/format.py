"""The format of a checkpoint: every key of it stands here, once, and what a checkpoint must agree on with a module.

`state_dict`, and every other state dict of the model that a callback has put into the checkpoint (an average, say),
holds dense weights under the module's own keys; of layers that no dense weight stands for (`latents`) it holds the
factors under theirs, which a dense module refuses. Beside them, `"phantom"` holds what training needs to go on:

    version         1
    method          "phantom" (also where there is none) or "tensor_parallel"
    num_blocks      p, of phantom layers (`SplitLinear.shared_record`)
    layers          {name: {"in_features", "out_features", "bias", "phantom_width" of phantom layers,
                    "transposed" where dense weights are [in, out], "parts" where the factors' rows are in the order
                    of `factors.by_block`, "mixing" where it is not "pairwise", "latents" and "predecessor" where they
                    are not its own}} (`SplitLinear.record`)
    factors         full, of phantom layers: [{"path": [keys down to a state dict], "tensors": {key: all ranks'}}, ...]
    split           sharded: {name: {parameter: the dimension along which it is split}}
    optimizers      per optimizer: {"state": {parameter name: ...}, "param_groups": [...]}, of all ranks
    rng             {"mid_epoch", "states": per rank, of its random number generators}
    converted       True: from a conversion, with weights alone

In `rest.pt` of a sharded checkpoint {"phantom_tensor": its name, "shape", "dtype", "dim" along which it is split}
stands where a tensor was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_phantom.checkpoints.states import is_whole, layers_named
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.split import any_layer, split_layers

VERSION = 1
ENTRY = "phantom"
OPTIMIZERS = "optimizers"  # also what the names of their tensors begin with in a sharded checkpoint
_VERSION, _METHOD, _LAYERS = "version", "method", "layers"
_FACTORS, _SPLIT, _RNG, _CONVERTED = "factors", "split", "rng", "converted"
_BLOCKS, _NO_METHOD = "num_blocks", "phantom"
# Of a layer's record: what its module decides. The rest are settings of the strategy, under their own names.
_OF_THE_MODULE = ("in_features", "out_features", "bias", "transposed", "predecessor")
_FOLLOWED = "parts"  # which a layer takes over (`SplitLinear.take_over`)
_USUAL = {"mixing": "pairwise", "latents": "own"}  # of a record that does not say


class SavedFactors(NamedTuple):
    """The parameters of all ranks that a state dict's dense weights stand for."""

    path: list[str | int]
    tensors: dict[str, Tensor]


class SavedGenerators(NamedTuple):
    """The states of the random number generators of each rank."""

    mid_epoch: bool
    states: list[Any]


class SavedTensor(NamedTuple):
    """What stands in the place of a tensor that lies in other files."""

    phantom_tensor: str
    shape: list[int]
    dtype: torch.dtype
    dim: int | None

    @classmethod
    def at(cls, value: Any) -> SavedTensor | None:
        """What `value` stands for, if for a tensor."""
        return cls(**value) if isinstance(value, Mapping) and cls._fields[0] in value else None


class PhantomRecord(NamedTuple):
    """A phantom layer, as its `record` has it."""

    in_features: int
    out_features: int
    bias: bool
    phantom_width: int
    transposed: bool = False
    parts: int = 1
    mixing: str = _USUAL["mixing"]
    latents: str = _USUAL["latents"]
    predecessor: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What is saved of it."""
        return {key: value for key, value in self._asdict().items() if value != self._field_defaults.get(key)}


def describe(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must agree on with the module that loads it."""
    layers, first = split_layers(module), any_layer(module)
    return _description(first.method, first.shared_record(), {name: layer.record() for name, layer in layers.items()})


def describe_phantom(method: str, num_blocks: int, layers: Mapping[str, PhantomRecord]) -> dict[str, Any]:
    """The same of phantom layers that no module holds."""
    return _description(method, {_BLOCKS: num_blocks}, {name: layer.as_dict() for name, layer in layers.items()})


def _description(method: str, shared: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any]:
    return {_VERSION: VERSION, _METHOD: method, **shared, _LAYERS: layers}


def with_entry(
    checkpoint: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
    *,
    factors: Iterable[SavedFactors] | None = None,
    split: Mapping[str, Mapping[str, int]] | None = None,
    optimizers: Any = None,
    rng: SavedGenerators | None = None,
    converted: bool | None = None,
) -> dict[str, Any]:
    """Return a checkpoint with this in its entry, beside what is there; the given one is not changed."""
    values = {
        _FACTORS: None if factors is None else [one._asdict() for one in factors],
        _SPLIT: split,
        OPTIMIZERS: optimizers,
        _RNG: None if rng is None else rng._asdict(),
        _CONVERTED: converted,
    }
    added = {key: value for key, value in values.items() if value is not None}
    return {**checkpoint, ENTRY: {**_entry(checkpoint), **(description or {}), **added}}


def without_entry(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as a dense one."""
    return {key: value for key, value in checkpoint.items() if key != ENTRY}


def _entry(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = checkpoint.get(ENTRY, {})
    if not isinstance(entry, Mapping):
        raise CheckpointError(
            f"the checkpoint's key {ENTRY!r} holds another's {type(entry).__name__}, but that is where the layers are "
            f"described: save yours under another key."
        )
    return entry


def method_of(checkpoint: Mapping[str, Any]) -> str | None:
    """The strategy's name that saved a checkpoint; None for a dense one."""
    return _entry(checkpoint).get(_METHOD, _NO_METHOD) if ENTRY in checkpoint else None


def num_blocks_of(checkpoint: Mapping[str, Any]) -> int:
    """The number of blocks of a checkpoint's phantom layers."""
    return _entry(checkpoint)[_BLOCKS]


def phantom_layers_of(checkpoint: Mapping[str, Any]) -> dict[str, PhantomRecord]:
    """A checkpoint's phantom layers, by name."""
    return {name: PhantomRecord(**record) for name, record in _entry(checkpoint)[_LAYERS].items()}


def names_of(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a checkpoint's split layers; none of a dense one."""
    return tuple(records_of(checkpoint))


def is_full(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with split layers holds the tensors of all ranks."""
    return _FACTORS in _entry(checkpoint)


def factors_of(checkpoint: Mapping[str, Any]) -> list[SavedFactors]:
    """The parameters that a full checkpoint's dense weights stand for."""
    return [SavedFactors(**one) for one in _entry(checkpoint).get(_FACTORS, ())]


def split_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
    """Along which dimensions a sharded checkpoint's layers are split."""
    return _entry(checkpoint).get(_SPLIT, {})


def optimizers_of(checkpoint: Mapping[str, Any]) -> list[Any] | None:
    """The states of the optimizers, by parameter name; None: it has none that split layers can go on from."""
    return _entry(checkpoint).get(OPTIMIZERS)


def generators_of(checkpoint: Mapping[str, Any]) -> SavedGenerators | None:
    """The states of the random number generators, if there are any."""
    saved = _entry(checkpoint).get(_RNG)
    return None if saved is None else SavedGenerators(**saved)


def is_converted(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint comes from a conversion, with weights alone."""
    return bool(_entry(checkpoint).get(_CONVERTED))


def check_version(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless this release reads the checkpoint's entry."""
    saved = _entry(checkpoint).get(_VERSION)
    if saved != VERSION:
        raise CheckpointError(f"the checkpoint has format version {saved!r}, this release reads {VERSION}; upgrade.")


def check_readable(checkpoint: Any) -> None:
    """Raise CheckpointError unless this is a checkpoint, dense or one that this release reads."""
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"this is no checkpoint: it holds a {type(checkpoint).__name__}.")
    if ENTRY in checkpoint:
        check_version(checkpoint)


def records_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The records of a checkpoint's layers, by name; none of a dense one."""
    return _entry(checkpoint).get(_LAYERS, {})


def check_fits(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint is dense or was saved from the same layers by the same method."""
    if ENTRY not in checkpoint:
        return
    saved, here, first = _entry(checkpoint), describe(module), any_layer(module)
    if method_of(checkpoint) != first.method:
        raise CheckpointError(
            f"the checkpoint was saved by strategy={method_of(checkpoint)!r} in shards, which this strategy, "
            f"{first.method!r}, cannot read: load it there and save it with state_dict_type='full'."
        )
    for key, ours in first.shared_record().items():
        if saved.get(key) != ours:
            raise CheckpointError(
                f"the checkpoint was saved with {key}={saved.get(key)}, the model has {key}={ours}: set "
                f"{key}={saved.get(key)}; the number of ranks need not be the same."
            )
    for name in dict.fromkeys([*saved[_LAYERS], *here[_LAYERS]]):
        _check_layer(name, first.kind, saved[_LAYERS].get(name), here[_LAYERS].get(name))
    for entry in factors_of(checkpoint):
        for base, layer in layers_named(module, entry.tensors).items():
            for name, parameter in layer.named_parameters(recurse=False):
                tensor, split = entry.tensors.get(base + name), layer.split_of(name)
                if tensor is None or (split is not None and not is_whole(tensor, parameter, split)):
                    found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    raise CheckpointError(f"the checkpoint is damaged: {base + name!r} is {found}.")


def _check_layer(name: str, kind: str, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    if theirs is None or ours is None:
        where = "the model" if theirs is None else "the checkpoint"
        raise CheckpointError(f"{name!r} is a {kind} layer only in {where}; use the plan it was saved with.")
    for key in (key for key in {**theirs, **ours} if key != _FOLLOWED):  # in the order of the record
        saved, here = (record.get(key, _USUAL.get(key)) for record in (theirs, ours))
        if saved != here:
            raise CheckpointError(
                f"{name!r} has {key}={saved} in the checkpoint and {key}={here} in the model; "
                f"resume with the {'module' if key in _OF_THE_MODULE else key} it was saved with."
            )
