"""Models that compute parts in float32, in float64 instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOW = torch.float32, torch.float16, torch.bfloat16


class InFloat64(TorchFunctionMode):
    """Norms and softmaxes that a model computes in float32, in float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        kwargs = {
            k: torch.float64 if v in LOW else v for k, v in (kwargs or {}).items() if isinstance(v, torch.dtype)
        } | {k: v for k, v in (kwargs or {}).items() if not isinstance(v, torch.dtype)}
        return func(*(torch.float64 if isinstance(a, torch.dtype) and a in LOW else a for a in args), **kwargs)
