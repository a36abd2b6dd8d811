"""What the first training step of a run shows: layers that it does not reach, exchanges that nobody meant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_phantom.layers.activation import Gathered, watch_gathers
from lightning_phantom.layers.split import split_layers
from lightning_phantom.plan.record import Plan


class FirstStep:
    """Watches the first training step, and reports when it is over.

    Args:
        module: the module that is trained.
        plan: what has been swapped in it.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._plan = plan
        self._gathered: list[Gathered] | None = None
        self._without: dict[int, str] = {}
        self._handles = []
        for name, layer in split_layers(module).items():
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._without[id(parameter)] = f"{name}.{key}"
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._reached))

    def _reached(self, parameter: Tensor) -> None:
        self._without.pop(id(parameter), None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The first step runs inside."""
        with watch_gathers() as seen:
            yield
        self._gathered = seen

    @property
    def is_over(self) -> bool:
        """Whether the first step has run."""
        return self._gathered is not None

    def report(self) -> None:
        """Say, on rank 0, what there was to see."""
        for handle in self._handles:
            handle.remove()
        if self._without:
            names = list(self._without.values())
            rank_zero_warn(
                f"the first training step gave no gradient to {', '.join(names[:6])}{', ...' * (len(names) > 6)}. If "
                f"these layers should train, something runs in their place, or nothing reads their output."
            )
        ends = {name for ffn in self._plan.ffns for group in ffn.groups if group.leaves for name in group.names}
        inner = dict.fromkeys(g for g in self._gathered or [] if g.layer not in ends)
        if inner:
            each = "\n".join(f"  {layer}: {operation}  {line}" for layer, operation, line in list(inner)[:20])
            rank_zero_info(
                f"Inside a feed-forward network these operations brought activations back to tokens, an exchange each "
                f"that others would not need (layer: operation, where):\n{each}"
            )
