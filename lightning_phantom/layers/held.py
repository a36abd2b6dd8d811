"""What an activation between ranks holds, and the ways out of it: its values as a plain tensor, and autograd's."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import to_features, to_tokens
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import LayoutError

H = TypeVar("H", bound="Held")


class Place(NamedTuple):
    """Where an activation was made.

    Attributes:
        ranks: those that hold its features between them.
        rows: the tokens of each.
        layer: name of the layer that it comes from.
        parts: of the width, of each of which every rank holds its features, side by side; see `across.chunk`.
    """

    ranks: Ranks
    rows: Rows
    layer: str
    parts: int = 1

    def tokens(self, local: Tensor, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """Feature layout [T, width/R] -> token layout, of own shape [*lead, width]."""
        what = f"exit of {self.layer!r}"
        if local.is_floating_point():
            x = to_tokens(local, self.ranks, self.rows, what, scale)
        else:
            raw = local.contiguous().view(torch.uint8)  # a comparison, say: it has no gradient
            x = to_tokens(raw, self.ranks, self.rows, what).view(local.dtype)
        # No view, as a linear's output is none: torch fails on hooks of views that have been written into.
        return torch.ops.aten._unsafe_view(_exchanged(x, self.ranks.size, self.parts), shape)  # type: ignore[no-any-return]

    def features(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Token layout [*lead, width] -> feature layout [T, width/R]."""
        matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        matrix = _exchanged(matrix, self.parts, self.ranks.size)
        return to_features(matrix, self.ranks, self.rows, f"return to {self.layer!r}", scale)

    @property
    def gradient_scale(self) -> float:
        """A gradient in token layout, over the same in feature layout; see `distributed.exchange`."""
        return 1 if self.rows.shared else self.ranks.size


def _exchanged(x: Tensor, outer: int, inner: int) -> Tensor:
    """Features [t, outer * inner * n] as [t, inner * outer * n]: of ranks and their parts, parts and their ranks."""
    return x if 1 in (outer, inner) else x.unflatten(1, (outer, inner, -1)).transpose(1, 2).flatten(1)


class Gathered(NamedTuple):
    """An operation that made an activation go back to tokens.

    Attributes:
        layer: the layer that the activation came from.
        operation: name of the function.
        line: where in the user's code, `file:line`; empty if that cannot be told.
    """

    layer: str
    operation: str
    line: str


_watchers: list[list[Gathered]] = []


@contextmanager
def watch_gathers() -> Iterator[list[Gathered]]:
    """Collect what makes activations go back to tokens inside the `with` block."""
    seen: list[Gathered] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [w for w in _watchers if w is not seen]


class Held(Tensor):
    """A tensor of own shape [*lead, width], of which this rank holds its features of all the group's tokens.

    Attributes:
        local: [T, width/R]; None once it has been written to as a whole.
        place: where it was made.
    """

    local: Tensor | None
    place: Place
    _whole: Tensor | None
    _version_made: int | None  # of the whole, when it was
    _relatives: list[weakref.ref[Held]]  # activations with the same memory, itself among them
    _rewritten: bool  # in place, since autograd was told of it

    @staticmethod
    def __new__(cls: type[H], local: Tensor, shape: Sequence[int]) -> H:
        """A tensor of `shape` that holds nothing yet; `wrap` makes activations."""
        made: H = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        return made

    @classmethod
    def wrap(cls: type[H], local: Tensor, shape: Sequence[int], place: Place) -> H:
        """The activation of own shape [*lead, width] that `local` [T, width/R] holds."""
        if local.requires_grad and torch.is_grad_enabled():
            activation: H = _AsTokens.apply(local, torch.Size(shape), place, cls)
        else:
            activation = cls(local, shape)
        activation.local, activation.place = local, place
        activation._whole = activation._version_made = None
        activation._relatives, activation._rewritten = [weakref.ref(activation)], False
        return activation

    def settle(self) -> None:
        """Give up `local` where it does not tell all."""
        if torch.is_grad_enabled() and self.local is not None and self.requires_grad and not self.local.requires_grad:
            self._whole, self.local = _AsMade.apply(self), None  # an autograd function has returned it
        for other in self.sharing_memory():
            if other.local is not None and other._whole is not None:
                if version_of(other._whole) != other._version_made:
                    other._give_up(other._whole, "a view")

    def sharing_memory(self) -> list[Held]:
        """This and the other activations that have its memory (`detach`, `data`)."""
        return [other for relative in self._relatives if (other := relative()) is not None]

    def whole(self, reader: str) -> Tensor:
        """The plain tensor [*lead, width], made once; `reader` names the operation that asks for it."""
        self.settle()
        local, kept = self.local, self._whole
        if local is None:
            assert kept is not None
            return kept
        if self._rewritten and not torch.is_grad_enabled() and local.requires_grad and in_autograd_function():
            raise LayoutError(
                f"an autograd function reads an activation of {self.place.layer!r} after it was written to in place "
                f"({reader}): its gradient would be lost. Write into a clone()."
            )
        lacks_graph = torch.is_grad_enabled() and local.requires_grad and kept is not None and not kept.requires_grad
        if kept is None or lacks_graph:  # `local` is not written to while this is there
            for seen in _watchers:
                seen.append(Gathered(self.place.layer, reader, _line_of_user()))
            self._whole = kept = self.place.tokens(local, self.shape)
            self._version_made = version_of(kept)
        return kept

    def become_whole(self, writer: str) -> Tensor:
        """Give up `local`: from now on the activation is the plain tensor, which is about to be written to."""
        return self._give_up(self.whole(writer), writer)

    def _give_up(self, whole: Tensor, writer: str) -> Tensor:
        if len(self.sharing_memory()) > 1:
            raise LayoutError(
                f"{writer} writes into an activation of {self.place.layer!r} that shares its memory with another "
                f"(detach, data, chunk). Write into a clone()."
            )
        self._whole, self.local = whole, None
        return whole


class _AsTokens(torch.autograd.Function):
    """An activation's node in the graph, for those that read it past `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, shape: torch.Size, place: Place, kind: type[H]) -> H:
        ctx.place = place
        return kind(local, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.place.features(grad, 1 / ctx.place.gradient_scale), None, None, None


class _AsMade(torch.autograd.Function):
    """The plain tensor of an activation that an autograd function has returned, such as a checkpoint's."""

    @staticmethod
    def forward(ctx: Any, activation: Held) -> Tensor:
        return activation.whole("autograd.Function").clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def version_of(x: Tensor) -> int | None:
    """What changes when x is written to; None where torch does not tell."""
    return None if x.is_inference() else x._version


_OURS = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__))


def _line_of_user() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def in_autograd_function() -> bool:
    """Whether an autograd function's forward is at work, which reads past `__torch_function__`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is torch.autograd.Function.apply.__func__.__code__:  # type: ignore[attr-defined]
            return True
        frame = frame.f_back
    return False
