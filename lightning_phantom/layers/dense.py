"""The dense linears that can be swapped: torch's `nn.Linear`, and the `Conv1D` of Hugging Face's GPT-2.

They are one map with two orientations of the weight: [out, in] in `nn.Linear`, [in, out] in `Conv1D`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(cls: type) -> bool:
    """Whether `cls` is `transformers.pytorch_utils.Conv1D`; transformers is not imported to find out."""
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer: an `nn.Linear`, a subclass of it, or a `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(type(module))


@torch.no_grad()
def is_plain_linear(module: nn.Module) -> bool:
    """Whether a linear computes what `nn.Linear` does: `Conv1D`, and subclasses that leave it be or say the same."""
    if is_conv1d(type(module)) or type(module).forward is nn.Linear.forward:
        return True
    weight, bias = module.weight, module.bias
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        y = type(module).forward(module, x)
    except Exception:  # a forward of the user's own, which may want anything
        return False
    expected = nn.functional.linear(x, weight, bias)  # type: ignore[arg-type]
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


def features(linear: Any) -> tuple[int, int]:
    """The widths of a linear's input and output."""
    return (linear.nx, linear.nf) if is_conv1d(type(linear)) else (linear.in_features, linear.out_features)


def oriented(weight: Tensor, cls: type) -> Tensor:
    """Turn a weight [out, in] into the orientation of `cls`, or back: the same step, a view where it is one."""
    return weight.t() if is_conv1d(cls) else weight


def make_linear(cls: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A `cls` that holds the weight, given as [out, in], and the bias [out]."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        sizes = (out_features, in_features) if is_conv1d(cls) else (in_features, out_features, bias is not None)
        linear: nn.Module = cls(*sizes)
    linear.weight = nn.Parameter(oriented(weight, cls).contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias)
    return linear
