"""Activations that know how they lie between ranks, so that the code around the layers need not.

A layer on R > 1 ranks returns a `ShardedActivation`. To all code it is what the dense layer would have returned: this
rank's own tokens with all features, [*lead, width]. What it holds is the group's tokens with this rank's own features,
`local` [T, width/R].

| operation | what happens |
|---|---|
| treats every feature alone (`elementwise.TABLE`) | is done on `local`, stays sharded |
| knows how features lie (`across.TABLE`) | is done on `local`, with an exchange of a few numbers a token or none |
| another layer | reads `local` |
| questions about shape, type, gradient | are answered |
| anything else | goes back to tokens, once (`whole`), and is done on the plain tensor |
| reads raw memory, or changes the shape in place | LayoutError |

To autograd it is a tensor of its own shape, too: an autograd function or a compiled kernel that passes by
`__torch_function__` reads the plain values, and the gradient that it returns finds its way inside.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_phantom.errors import LayoutError
from lightning_phantom.layers import across
from lightning_phantom.layers.elementwise import ANSWERS, TABLE
from lightning_phantom.layers.held import Gathered, Held, Place, version_of, watch_gathers
from lightning_phantom.layers.operations import SPECIAL, activations_in, answer, by_feature, by_token, plain

__all__ = ["Gathered", "Place", "ShardedActivation", "version_of", "watch_gathers"]


class ShardedActivation(Held):
    """A layer's output in feature layout; see the module's docstring. `wrap` makes one."""

    @classmethod
    @torch.compiler.disable  # in what a compiled function calls, each frame from here on would be compiled by itself
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do `func` where the features lie if it treats each alone, else on plain tensors."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in ANSWERS:
                return answer(func, args, kwargs)
            if func in SPECIAL:
                return SPECIAL[func](*args, **kwargs)
            if func in across.TABLE:
                done = across.TABLE[func].apply(*args, **kwargs)
                if done is not NotImplemented:
                    return done
            if func in TABLE:
                done = by_feature(func, TABLE[func], args, kwargs)
                if done is not NotImplemented:
                    return done
            return by_token(func, args, kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Give plain values to what has passed by `__torch_function__`; autograd sees the activation itself."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            first = next(activations_in([*args, *kwargs.values()]))
            raise LayoutError(
                f"{func} writes into an activation of {first.place.layer!r}, of which each rank holds its features "
                f"only. Pass it a clone() times 1, or skip the layer in the plan."
            )
        with torch.no_grad():
            return func(*plain(args, str(func)), **plain(kwargs, str(func)))
