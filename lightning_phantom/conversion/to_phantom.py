"""Checkpoints from dense to phantom, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_phantom.checkpoints.format import num_blocks_of
from lightning_phantom.conversion.calibrate import Moments, calibrated
from lightning_phantom.conversion.report import ConversionReport
from lightning_phantom.conversion.result import Result, is_phantom, relative, turned
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import CheckpointError
from lightning_phantom.layers.factors import Blocks, by_block, from_dense, to_dense
from lightning_phantom.plan.record import Plan, PlannedLayer

STATISTICS_BYTES = 4 * 2**30  # layers whose moments take more than this together are calibrated in several passes
Statistics = Callable[[Sequence[str]], tuple[Mapping[str, Moments], Mapping[str, Moments]]]


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
    if is_phantom(checkpoint):
        raise CheckpointError(
            f"the checkpoint holds phantom layers of {num_blocks_of(checkpoint)} blocks already. Merge their blocks "
            f"(--merge), or make it dense first (--to dense)."
        )
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    for layer in plan.swapped:
        if not bool(state[f"{layer.name}.weight"].isfinite().all()):
            raise CheckpointError(f"{layer.name!r} holds NaN or infinite weights.")
    p = plan.config.parts
    result = Result(checkpoint, p, folder)
    for group in _groups(plan.swapped) if statistics else [plan.swapped]:
        fit, held_out = statistics([layer.name for layer in group]) if statistics else ({}, {})
        for layer in group:
            on_layer(layer.name)
            blocks = _blocks(layer, plan)
            weight = by_block(turned(state[f"{layer.name}.weight"], layer.transposed), p, layer.parts)
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
            errors = (relative(written[0], weight), wrong_before, wrong)
            result.report(blocks, errors, layer.weights_before, layer.weights_after)
    return result.checkpoint(), ConversionReport(tuple(result.rows))


def _check_kind(config: Any) -> None:
    """Raise CheckpointError for phantom layers that cannot be made from dense weights."""
    if config.latents == "previous":
        raise CheckpointError(
            "latents='previous': these layers read latents of another value than the dense layer did, so its weight "
            "says nothing about them. Train them from init='random'."
        )


def _blocks(layer: PlannedLayer, plan: Plan) -> Blocks:
    """The blocks that a planned layer will have."""
    assert layer.phantom_width is not None
    widths = {other.name: other.phantom_width for other in plan.swapped}
    sizes = layer.in_features, layer.out_features, plan.config.parts, layer.phantom_width
    before = widths[layer.predecessor] if layer.predecessor else 0
    return Blocks(*sizes, plan.config.seed, layer.name, plan.config.mixing, width_before=before or 0)


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
