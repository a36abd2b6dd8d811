"""Phantom checkpoints to fewer blocks and to plain weights, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_phantom.checkpoints.format import (
    PhantomRecord,
    check_version,
    factors_of,
    num_blocks_of,
    phantom_layers_of,
)
from lightning_phantom.config import resolve_phantom_width
from lightning_phantom.conversion.report import ConversionReport, ConvertedLayer
from lightning_phantom.conversion.result import WEIGHTS_PATH, Result, is_phantom, relative, weights_alone
from lightning_phantom.cost.count import phantom_weights
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.factors import Blocks, Factors, by_coarse_block, merge, to_dense, width_of
from lightning_phantom.layers.phantom import FACTORS


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
    tensors = {
        key: t for entry in factors_of(checkpoint) if entry.path == WEIGHTS_PATH for key, t in entry.tensors.items()
    }
    if missing := [key for name in layers for key in (f"{name}.{f}" for f in FACTORS[:3]) if key not in tensors]:
        raise CheckpointError(f"the checkpoint is damaged: {missing[0]!r} is missing from its factors.")
    result = Result(checkpoint, p // q, folder)
    for name, layer in layers.items():
        on_layer(name)
        factors = Factors(*(tensors[f"{name}.{factor}"] for factor in FACTORS[:3]))
        mixing = layer.mixing
        merged, bias = merge(factors, p, q, mixing), tensors.get(f"{name}.bias")
        error = relative(to_dense(merged, p // q, mixing), to_dense(factors, p, mixing))
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
    return weights_alone(checkpoint, checkpoint["state_dict"]), ConversionReport(tuple(rows))


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


def _phantom_layers(checkpoint: Mapping[str, Any]) -> tuple[int, dict[str, PhantomRecord]]:
    """The number of blocks, and the layers by name."""
    if not is_phantom(checkpoint):
        raise CheckpointError("the checkpoint is dense: it holds no phantom layers.")
    check_version(checkpoint)
    return num_blocks_of(checkpoint), phantom_layers_of(checkpoint)


def _check_dense(layers: Mapping[str, PhantomRecord]) -> None:
    """Raise CheckpointError where a layer has no dense weight."""
    for name, layer in layers.items():
        if layer.predecessor:
            raise CheckpointError(
                f"{name!r} reads latents of {layer.predecessor!r} (latents={layer.latents!r}): no dense weight stands "
                f"for it, so it can neither be made dense nor merged."
            )
