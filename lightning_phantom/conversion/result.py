"""What conversions make: a checkpoint of this package's full format with weights alone, and the report about it.

Training starts anew from it, which the checkpoint says (`is_converted`). Large tensors of it lie in unnamed files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_phantom.checkpoints.format import (
    ENTRY,
    PhantomRecord,
    SavedFactors,
    describe_phantom,
    method_of,
    with_entry,
)
from lightning_phantom.conversion.on_disk import on_disk
from lightning_phantom.conversion.report import ConvertedLayer
from lightning_phantom.framework import pl
from lightning_phantom.layers.factors import Blocks, Factors, by_part, width_of
from lightning_phantom.layers.phantom import FACTORS, PhantomLinear

# What Lightning and its callbacks keep of a training that is under way.
_PROGRESS = {
    *("epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers", ENTRY),
    *("current_model_state", "averaging_state", "native_amp_scaling_state", "MixedPrecision"),
}
WEIGHTS_PATH: list[str | int] = ["state_dict"]  # where the weights are that a conversion reads and writes


class Result:
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
        self.state[f"{name}.weight"] = on_disk(turned(weight, transposed), self.folder)
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
        factors = [SavedFactors(WEIGHTS_PATH, self.tensors)]
        return with_entry(weights_alone(self.source, self.state), description, factors=factors, converted=True)


def weights_alone(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint from which a fit starts at its first epoch, with what the module itself has put into it."""
    kept = {key: value for key, value in checkpoint.items() if key not in _PROGRESS}
    start = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    version = pl.__version__  # type: ignore[attr-defined]
    return {"pytorch-lightning_version": version, **kept, **start, "state_dict": dict(state)}


def is_phantom(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds phantom layers."""
    return method_of(checkpoint) == PhantomLinear.method


def turned(weight: Tensor, transposed: bool) -> Tensor:
    """A weight [out, in] as its layer keeps it, or back: the same step."""
    return weight.t().contiguous() if transposed else weight


def relative(approximate: Tensor, exact: Tensor) -> float:
    """The distance of one tensor from another, over the norm of that other."""
    return float((approximate.double() - exact).norm() / exact.double().norm().clamp(min=1e-300))
