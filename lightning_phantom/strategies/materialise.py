"""Before a run: fills weights that have no storage yet."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from lightning_phantom.errors import PhantomError


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give storage and fresh values to what is still on the meta device.

    Raises:
        PhantomError: a module does not say how its values start.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for m in module.modules():
        for key, parameter in m._parameters.items():
            if parameter is not None and parameter.is_meta:
                places[id(parameter)].append((m, key))
    # Children first, as constructors run: a parent may start some of their values otherwise.
    for name, m in reversed(list(module.named_modules())):
        own = [*m.parameters(recurse=False), *m.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        reset = getattr(m, "reset_parameters", None) or getattr(m, "_reset_parameters", None)
        if not callable(reset):
            raise PhantomError(
                f"{name!r} ({type(m).__name__}) is on the meta device and has no reset_parameters() to fill it; "
                f"build it on a real device."
            )
        m.to_empty(device=device, recurse=False)
        reset()
    for (first, first_key), *tied in places.values():  # to_empty gave each place a tensor of its own
        for m, key in tied:
            m._parameters[key] = first._parameters[first_key]
