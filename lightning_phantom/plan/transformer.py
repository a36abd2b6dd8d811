"""The fused path of torch's own transformer layers, past the forwards of their linears.

In eval mode nn.TransformerEncoderLayer hands the weights of its linears to one fused kernel, and nn.TransformerEncoder
packs padded batches into nested tensors for it. Where a linear was swapped both are switched off.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_BEFORE = "_before_phantom"


def switch_off(root: nn.Module, swapped: type[nn.Module]) -> None:
    """Switch the fused path off around every module of type `swapped`."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if isinstance(module.linear1, swapped) or isinstance(module.linear2, swapped):
                _set(module, "activation_relu_or_gelu", 0)
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder) and any(_BEFORE in vars(layer) for layer in module.layers):
            _set(module, "use_nested_tensor", False)


def restore(root: nn.Module) -> None:
    """Put back what `switch_off` changed."""
    for module in root.modules():
        vars(module).update(vars(module).pop(_BEFORE, {}))


def _set(module: nn.Module, name: str, value: Any) -> None:
    kept = vars(module).setdefault(_BEFORE, {})
    kept.setdefault(name, getattr(module, name))
    setattr(module, name, value)
