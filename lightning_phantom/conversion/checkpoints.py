"""Checkpoint files from dense to phantom, to fewer blocks, and back, one layer at a time.

What a conversion returns is a checkpoint of this package's full format with weights alone: training starts anew from
it, which the checkpoint says (`is_converted`). Large tensors of it lie in unnamed files.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_phantom.checkpoints.files import AtomicCheckpointIO, check_records
from lightning_phantom.checkpoints.format import (
    ENTRY,
    PhantomRecord,
    SavedFactors,
    check_version,
    describe_phantom,
    factors_of,
    method_of,
    num_blocks_of,
    phantom_layers_of,
    with_entry,
)
from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.conversion.calibrate import Moments, calibrated
from lightning_phantom.conversion.on_disk import on_disk
from lightning_phantom.conversion.report import ConversionReport, ConvertedLayer
from lightning_phantom.cost.count import phantom_weights
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import CheckpointError
from lightning_phantom.framework import pl
from lightning_phantom.layers.factors import (
    Blocks,
    Factors,
    by_block,
    by_coarse_block,
    by_part,
    from_dense,
    merge,
    to_dense,
    width_of,
)
from lightning_phantom.layers.phantom import FACTORS, PhantomLinear
from lightning_phantom.plan.record import Plan, PlannedLayer

STATISTICS_BYTES = 4 * 2**30  # layers whose moments take more than this together are calibrated in several passes
# What Lightning and its callbacks keep of a training that is under way.
_PROGRESS = {
    *("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", ENTRY),
    *("current_model_state", "averaging_state", "native_amp_scaling_state", "MixedPrecision"),
}
_PATH: list[str | int] = ["state_dict"]  # where the weights are that a conversion reads and writes
Statistics = Callable[[Sequence[str]], tuple[Mapping[str, Moments], Mapping[str, Moments]]]


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


def to_phantom(
    checkpoint: Mapping[str, Any],
    plan: Plan,
    folder: Path,
    statistics: Statistics | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Any], ConversionReport]:
    """Convert a dense checkpoint.

    Args:
        checkpoint: what `read` returned.
        plan: of the module that it belongs to.
        folder: where the tensors of the result lie until it is saved.
        statistics: calibrates: returns the moments of the named layers' inputs, those to fit to and those held out.
        on_layer: called with the name of each layer before it is converted.

    Raises:
        CheckpointError: it holds phantom layers already, or weights that nothing can start from; or layers are asked
            for that a dense weight says nothing about.
    """
    _check_kind(plan.config)
    if _is_phantom(checkpoint):
        raise CheckpointError(
            f"the checkpoint holds phantom layers of {num_blocks_of(checkpoint)} blocks already. Merge their blocks "
            f"(--merge), or make it dense first (--to dense)."
        )
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    for layer in plan.swapped:
        if not bool(state[f"{layer.name}.weight"].isfinite().all()):
            raise CheckpointError(f"{layer.name!r} holds NaN or infinite weights.")
    p = plan.config.parts
    result = _Result(checkpoint, p, folder)
    for group in _groups(plan.swapped) if statistics else [plan.swapped]:
        fit, held_out = statistics([layer.name for layer in group]) if statistics else ({}, {})
        for layer in group:
            on_layer(layer.name)
            blocks = _blocks(layer, plan)
            weight = by_block(_turned(state[f"{layer.name}.weight"], layer.transposed), p, layer.parts)
            bias = state.get(f"{layer.name}.bias")
            bias = None if bias is None else by_block(bias, p, layer.parts)
            plain = from_dense(weight, blocks, Ranks(None))
            factors, new_bias = plain, bias
            if statistics:
                factors, new_bias = calibrated(weight, bias, plain, blocks, fit[layer.name])
            # Of the layer before nothing is read yet, so a dense weight says what the layer computes at first.
            written = to_dense(factors, p, plan.config.mixing), new_bias
            how = plan.config.mixing, layer.latents, layer.predecessor
            result.store(layer.name, factors, *written, layer.transposed, layer.parts, *how)
            wrong = wrong_before = None
            if statistics:
                wrong_before = held_out[layer.name].output_error(
                    (weight, bias), (to_dense(plain, p, plan.config.mixing), bias)
                )
                wrong = held_out[layer.name].output_error((weight, bias), written)
            errors = (_relative(written[0], weight), wrong_before, wrong)
            result.report(blocks, errors, layer.weights_before, layer.weights_after)
    return result.checkpoint(), ConversionReport(tuple(result.rows))


def to_fewer_blocks(
    checkpoint: Mapping[str, Any], q: int, folder: Path, on_layer: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Any], ConversionReport]:
    """Merge every q blocks of a phantom checkpoint into one: the same function with p/q blocks of width q*k.

    Raises:
        CheckpointError: it holds no phantom layers, or q is not possible.
    """
    p, layers = _phantom_layers(checkpoint)
    _check_dense(layers)
    possible = [n for n in range(2, p) if p % n == 0]
    if q not in possible:
        raise CheckpointError(
            f"--merge {q}: the checkpoint has {p} blocks. "
            + (f"Possible: {', '.join(map(str, possible))}. " if possible else "Fewer are one block, the dense layer. ")
            + "For one block use --to dense."
        )
    tensors = {key: t for entry in factors_of(checkpoint) if entry.path == _PATH for key, t in entry.tensors.items()}
    if missing := [key for name in layers for key in (f"{name}.{f}" for f in FACTORS[:3]) if key not in tensors]:
        raise CheckpointError(f"the checkpoint is damaged: {missing[0]!r} is missing from its factors.")
    result = _Result(checkpoint, p // q, folder)
    for name, layer in layers.items():
        on_layer(name)
        factors = Factors(*(tensors[f"{name}.{factor}"] for factor in FACTORS[:3]))
        mixing = layer.mixing
        merged, bias = merge(factors, p, q, mixing), tensors.get(f"{name}.bias")
        error = _relative(to_dense(merged, p // q, mixing), to_dense(factors, p, mixing))
        rows = merged.weight, merged.decompressor, *([] if bias is None else [bias])
        local, d, *biases = (by_coarse_block(each, p, layer.parts, q) for each in rows)
        merged, bias = Factors(local, merged.compressor, d), next(iter(biases), None)
        dense = to_dense(merged, p // q, mixing)
        result.store(name, merged, dense, bias, layer.transposed, layer.parts, mixing)
        k = width_of(merged, p // q)
        blocks = Blocks(layer.in_features, layer.out_features, p // q, k, 0, name)
        before = phantom_weights(*blocks[:2], p, layer.phantom_width, bias is not None, mixing)
        after = phantom_weights(*blocks[:4], bias is not None, mixing)
        result.report(blocks, (error, None, None), before, after)
    return result.checkpoint(), ConversionReport(tuple(result.rows))


def to_plain(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], ConversionReport]:
    """Make a phantom checkpoint one that any strategy trains on from; its `state_dict` is dense already.

    Raises:
        CheckpointError: it holds no phantom layers.
    """
    p, layers = _phantom_layers(checkpoint)
    _check_dense(layers)
    rows = []
    for name, layer in layers.items():
        n_in, n_out, bias = layer.in_features, layer.out_features, layer.bias
        before = phantom_weights(n_in, n_out, p, layer.phantom_width, bias, layer.mixing)
        rows.append(ConvertedLayer(name, n_in, n_out, None, None, 0.0, None, None, before, n_in * n_out + bias * n_out))
    return _weights_alone(checkpoint, checkpoint["state_dict"]), ConversionReport(tuple(rows))


def width_setting(checkpoint: Mapping[str, Any]) -> int | float:
    """The `phantom_width` with which every phantom layer gets the width that it has in a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    p, named = _phantom_layers(checkpoint)
    layers = named.values()
    widths = [layer.phantom_width for layer in layers]
    smaller = [min(layer.in_features, layer.out_features) // p for layer in layers]
    least = max(k / m if k > 1 else 0 for k, m in zip(widths, smaller, strict=True))  # of any small fraction k = 1
    above = min((k + 1) / m for k, m in zip(widths, smaller, strict=True))
    for choice in (max(widths), least, (least + above) / 2, 2 * least, least + above):
        if isinstance(choice, int) or choice <= 1:
            resolved = [
                resolve_phantom_width(choice, layer.in_features, layer.out_features, p, layer.mixing)
                for layer in layers
            ]
            if resolved == widths:
                return choice
    raise CheckpointError(
        f"with {p} blocks the layers would have the widths {', '.join(map(str, widths))}, which no single "
        f"phantom_width gives. Make it dense (--to dense) and convert that instead."
    )


class _Result:
    """A checkpoint of p blocks and the report about it, while they are made."""

    def __init__(self, source: Mapping[str, Any], num_blocks: int, folder: Path) -> None:
        self.source, self.num_blocks, self.folder = source, num_blocks, folder
        self.state: dict[str, Any] = dict(source["state_dict"])
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[ConvertedLayer] = []
        self.layers: dict[str, PhantomRecord] = {}

    def store(
        self,
        name: str,
        factors: Factors,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        parts: int,
        *how: str,
    ) -> None:
        """Take a layer's factors, the weight [out, in] and bias they stand for in the blocks' order, and the rest."""
        (n_out, n_in), k = weight.shape, width_of(factors, self.num_blocks)
        self.layers[name] = record = PhantomRecord(n_in, n_out, bias is not None, k, transposed, parts, *how)
        for factor, tensor in zip((*FACTORS, "bias"), (*factors, bias), strict=True):
            if tensor is not None:
                self.tensors[f"{name}.{factor}"] = on_disk(tensor, self.folder)
        if record.predecessor:  # it will read latents of another, which no dense weight stands for
            self.state.update({key: t for key, t in self.tensors.items() if key.rpartition(".")[0] == name})
            return
        weight = by_part(weight, self.num_blocks, parts)
        self.state[f"{name}.weight"] = on_disk(_turned(weight, transposed), self.folder)
        if bias is not None:
            whole = self.tensors[f"{name}.bias"]
            self.state[f"{name}.bias"] = (
                whole if parts == 1 else on_disk(by_part(bias, self.num_blocks, parts), self.folder)
            )

    def report(self, blocks: Blocks, errors: tuple[float, float | None, float | None], before: int, after: int) -> None:
        """Take a layer's row."""
        self.rows.append(ConvertedLayer(blocks.name, *blocks[:4], *errors, before, after))

    def checkpoint(self) -> dict[str, Any]:
        """The whole."""
        description = describe_phantom(PhantomLinear.method, self.num_blocks, self.layers)
        factors = [SavedFactors(_PATH, self.tensors)]
        return with_entry(_weights_alone(self.source, self.state), description, factors=factors, converted=True)


def _weights_alone(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint from which a fit starts at its first epoch, with what the module itself has put into it."""
    kept = {key: value for key, value in checkpoint.items() if key not in _PROGRESS}
    start = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    version = pl.__version__  # type: ignore[attr-defined]
    return {"pytorch-lightning_version": version, **kept, **start, "state_dict": dict(state)}


def _is_phantom(checkpoint: Mapping[str, Any]) -> bool:
    return method_of(checkpoint) == PhantomLinear.method


def _phantom_layers(checkpoint: Mapping[str, Any]) -> tuple[int, dict[str, PhantomRecord]]:
    """The number of blocks, and the layers by name."""
    if not _is_phantom(checkpoint):
        raise CheckpointError("the checkpoint is dense: it holds no phantom layers.")
    check_version(checkpoint)
    return num_blocks_of(checkpoint), phantom_layers_of(checkpoint)


def _check_kind(config: Any) -> None:
    """Raise CheckpointError for phantom layers that cannot be made from dense weights."""
    if config.latents == "previous":
        raise CheckpointError(
            "latents='previous': these layers read latents of another value than the dense layer did, so its weight "
            "says nothing about them. Train them from init='random'."
        )


def _check_dense(layers: Mapping[str, PhantomRecord]) -> None:
    """Raise CheckpointError where a layer has no dense weight."""
    for name, layer in layers.items():
        if layer.predecessor:
            raise CheckpointError(
                f"{name!r} reads latents of {layer.predecessor!r} (latents={layer.latents!r}): no dense weight stands "
                f"for it, so it can neither be made dense nor merged."
            )


def _blocks(layer: PlannedLayer, plan: Plan) -> Blocks:
    """The blocks that a planned layer will have."""
    assert layer.phantom_width is not None
    widths = {other.name: other.phantom_width for other in plan.swapped}
    sizes = layer.in_features, layer.out_features, plan.config.parts, layer.phantom_width
    before = widths[layer.predecessor] if layer.predecessor else 0
    return Blocks(*sizes, plan.config.seed, layer.name, plan.config.mixing, width_before=before or 0)


def _turned(weight: Tensor, transposed: bool) -> Tensor:
    """A weight [out, in] as its layer keeps it, or back: the same step."""
    return weight.t().contiguous() if transposed else weight


def _groups(layers: Sequence[PlannedLayer]) -> Iterator[list[PlannedLayer]]:
    """Cut layers into runs whose moments, to fit to and held out, fit into memory together; at least one each."""
    group: list[PlannedLayer] = []
    size = 0
    for layer in layers:
        needed = 2 * 8 * (layer.in_features + 1) ** 2
        if group and size + needed > STATISTICS_BYTES:
            yield group
            group, size = [], 0
        group.append(layer)
        size += needed
    yield group


def _relative(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate.double() - exact).norm() / exact.double().norm().clamp(min=1e-300))
