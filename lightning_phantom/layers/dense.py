"""The dense linears that can be swapped: torch's `nn.Linear`, and the `Conv1D` of Hugging Face's GPT-2.

They are one map with two orientations of the weight: [out, in] in `nn.Linear`, [in, out] in `Conv1D`.
"""

from __future__ import annotations

import copy
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
    """Whether a linear computes what `nn.Linear` does: `Conv1D`, and subclasses that leave it be or say the same.

    A forward of its own is tried on small weights, as this module and as the one that `make_linear` would make.
    """
    cls = type(module)
    if is_conv1d(cls) or cls.forward is nn.Linear.forward:
        return True
    x, weight, bias = (torch.linspace(-1, 1, n) for n in (6, 12, 4))
    x, weight = x.view(2, 3), weight.view(4, 3)
    made = make_linear(cls, weight, bias)
    here = copy.copy(module)
    vars(here)["_parameters"] = dict(made._parameters)
    try:
        outputs = [cls.forward(made, x), cls.forward(here, x)]
        return all(torch.allclose(y, nn.functional.linear(x, weight, bias), atol=1e-6) for y in outputs)
    except Exception:  # a forward of the user's own, which may want anything
        return False


def features(linear: Any) -> tuple[int, int]:
    """The widths of a linear's input and output."""
    return (linear.nx, linear.nf) if is_conv1d(type(linear)) else (linear.in_features, linear.out_features)


def oriented(weight: Tensor, cls: type) -> Tensor:
    """Turn a weight [out, in] into the orientation of `cls`, or back: the same step, a view where it is one."""
    return weight.t() if is_conv1d(cls) else weight


def make_linear(cls: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A `cls` that holds the weight, given as [out, in], and the bias [out]; its constructor may want anything."""
    linear: Any = cls.__new__(cls)
    nn.Module.__init__(linear)
    for size, name in zip(
        weight.shape, ("nf", "nx") if is_conv1d(cls) else ("out_features", "in_features"), strict=True
    ):
        setattr(linear, name, size)
    linear.weight = nn.Parameter(oriented(weight, cls).contiguous())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return linear  # type: ignore[no-any-return]
