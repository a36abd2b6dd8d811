"""Activations that know how they lie between ranks, so that the code around the layers need not.

A layer on R > 1 ranks returns a `ShardedActivation`. To all code it is what the dense layer would have returned: this
rank's own tokens with all features, [*lead, width]. What it holds is the group's tokens with this rank's own features,
`local` [T, width/R].

| operation | what happens |
|---|---|
| treats every feature alone (`elementwise.TABLE`) | is done on `local`, stays sharded |
| another layer | reads `local` |
| questions about shape, type, gradient | are answered |
| anything else | goes back to tokens, once (`whole`), and is done on the plain tensor |
| reads raw memory, or changes the shape in place | LayoutError |

To autograd it is a tensor of its own shape, too: an autograd function or a compiled kernel that passes by
`__torch_function__` reads the plain values, and the gradient that it returns finds its way inside.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lightning_phantom.distributed.agreement import Rows
from lightning_phantom.distributed.exchange import replicated, to_features, to_tokens
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import LayoutError
from lightning_phantom.layers.elementwise import ANSWERS, CASTS, IN_PLACE, RAW_MEMORY, REFUSED, TABLE

_plainly = torch._C.DisableTorchFunctionSubclass


class Place(NamedTuple):
    """Where an activation was made.

    Attributes:
        ranks: those that hold its features between them.
        rows: the tokens of each.
        layer: name of the layer that it comes from.
    """

    ranks: Ranks
    rows: Rows
    layer: str

    def tokens(self, local: Tensor, shape: Sequence[int], scale: float = 1.0) -> Tensor:
        """Feature layout [T, width/R] -> token layout, of own shape [*lead, width]."""
        what = f"exit of {self.layer!r}"
        if local.is_floating_point():
            return to_tokens(local, self.ranks, self.rows, what, scale).reshape(shape)
        raw = local.contiguous().view(torch.uint8)  # a comparison, say: it has no gradient
        return to_tokens(raw, self.ranks, self.rows, what).view(local.dtype).reshape(shape)

    def features(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Token layout [*lead, width] -> feature layout [T, width/R]."""
        matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        return to_features(matrix, self.ranks, self.rows, f"return to {self.layer!r}", scale)

    @property
    def gradient_scale(self) -> float:
        """A gradient in token layout, over the same in feature layout; see `distributed.exchange`."""
        return 1 if self.rows.shared else self.ranks.size


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


class ShardedActivation(Tensor):
    """A layer's output in feature layout; see the module's docstring.

    Attributes:
        local: [T, width/R]; None once it has been written to as a whole.
        place: where it was made.
    """

    local: Tensor | None
    place: Place
    _whole: Tensor | None
    _versions: tuple[int | None, int | None]  # of `local` and the whole, when that was made
    _relatives: list[weakref.ref[ShardedActivation]]  # activations with the same memory, itself among them
    _rewritten: bool  # in place, since autograd was told of it

    @staticmethod
    def __new__(cls, local: Tensor, shape: Sequence[int]) -> ShardedActivation:
        """A tensor of `shape` that holds nothing yet; `wrap` makes activations."""
        made: ShardedActivation = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        return made

    @classmethod
    def wrap(cls, local: Tensor, shape: Sequence[int], place: Place) -> ShardedActivation:
        """The activation of own shape [*lead, width] that `local` [T, width/R] holds."""
        if local.requires_grad and torch.is_grad_enabled():
            activation: ShardedActivation = _AsTokens.apply(local, torch.Size(shape), place)
        else:
            activation = cls(local, shape)
        activation.local, activation.place = local, place
        activation._whole, activation._versions = None, (None, None)
        activation._relatives, activation._rewritten = [weakref.ref(activation)], False
        return activation

    def settle(self) -> None:
        """Give up `local` where it does not tell all."""
        if torch.is_grad_enabled() and self.local is not None and self.requires_grad and not self.local.requires_grad:
            self._whole, self.local = _AsMade.apply(self), None  # an autograd function has returned it
        for other in self.sharing_memory():
            if other.local is not None and other._whole is not None:
                if version_of(other._whole) != other._versions[1]:
                    other._become_whole("a view")

    def sharing_memory(self) -> list[ShardedActivation]:
        """This and the other activations that have its memory (`detach`, `data`)."""
        return [other for relative in self._relatives if (other := relative()) is not None]

    def whole(self, reader: str) -> Tensor:
        """The plain tensor [*lead, width], made once; `reader` names the operation that asks for it."""
        self.settle()
        local, kept = self.local, self._whole
        if local is None:
            assert kept is not None
            return kept
        if self._rewritten and not torch.is_grad_enabled() and local.requires_grad and _in_autograd_function():
            raise LayoutError(
                f"an autograd function reads an activation of {self.place.layer!r} after it was written to in place "
                f"({reader}): its gradient would be lost. Write into a clone()."
            )
        lacks_graph = torch.is_grad_enabled() and local.requires_grad and kept is not None and not kept.requires_grad
        if kept is None or lacks_graph or self._versions[0] != version_of(local):
            for seen in _watchers:
                seen.append(Gathered(self.place.layer, reader, _line_of_user()))
            self._whole = kept = self.place.tokens(local, self.shape)
            self._versions = version_of(local), version_of(kept)
        return kept

    def _become_whole(self, writer: str) -> Tensor:
        """Give up `local`: from now on the activation is the plain tensor, which is about to be written to."""
        if len(self.sharing_memory()) > 1:
            raise LayoutError(
                f"{writer} writes into an activation of {self.place.layer!r} that shares its memory with another "
                f"(detach, data). Write into a clone()."
            )
        whole = self._whole if self._whole is not None and writer == "a view" else self.whole(writer)
        self._whole, self.local = whole, None
        return whole

    @classmethod
    @torch.compiler.disable  # in what a compiled function calls, each frame from here on would be compiled by itself
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do `func` where the features lie if it treats each alone, else on plain tensors."""
        kwargs = kwargs or {}
        with _plainly():
            if func in ANSWERS:
                return _answer(func, args, kwargs)
            if func in _SPECIAL:
                return _SPECIAL[func](*args, **kwargs)
            if func in TABLE:
                done = _by_feature(func, TABLE[func], args, kwargs)
                if done is not NotImplemented:
                    return done
            return _by_token(func, args, kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Give plain values to what has passed by `__torch_function__`; autograd sees the activation itself."""
        if func._schema.is_mutable:
            first = next(_activations_in([*args, *(kwargs or {}).values()]))
            raise LayoutError(
                f"{func} writes into an activation of {first.place.layer!r}, of which each rank holds its features "
                f"only. Pass it a clone() times 1, or skip the layer in the plan."
            )
        with torch.no_grad():
            return func(*_plain(args, str(func)), **_plain(kwargs or {}, str(func)))


class _AsTokens(torch.autograd.Function):
    """An activation's node in the graph, for those that read it past `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, shape: torch.Size, place: Place) -> ShardedActivation:
        ctx.place = place
        return ShardedActivation(local, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.place.features(grad, 1 / ctx.place.gradient_scale), None, None


class _AsMade(torch.autograd.Function):
    """The plain tensor of an activation that an autograd function has returned, such as a checkpoint's."""

    @staticmethod
    def forward(ctx: Any, activation: ShardedActivation) -> Tensor:
        return activation.whole("autograd.Function").clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    first = args[0]
    if isinstance(first, ShardedActivation) and first.local is None:
        args = (first._whole, *args[1:])
    return func(*args, **kwargs)


def _by_feature(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Apply an operation of the table to what this rank holds; NotImplemented where it would not be the same."""
    values = [*args, *kwargs.values()]
    activations = list(_activations_in(values))
    first = activations[0]
    ranks, rows, _ = first.place
    writes = name in IN_PLACE or bool(kwargs.get("inplace"))
    if not torch.is_grad_enabled() and any(a.requires_grad for a in activations) and _in_autograd_function():
        return NotImplemented  # autograd takes what comes out for a tensor of its own
    if "out" in kwargs or (writes and args[0] is not first):
        return NotImplemented
    if writes and any(other._whole is not None for other in first.sharing_memory()):
        return NotImplemented  # what was brought back may have views
    for activation in activations:
        activation.settle()
        place = activation.place
        if (
            activation.local is None
            or activation.shape != first.shape
            or place.rows.counts != rows.counts
            or place.ranks.process_group is not ranks.process_group
        ):
            return NotImplemented
    numbers: list[float] = []
    for value in values:
        if isinstance(value, ShardedActivation):
            continue
        if isinstance(value, Tensor):
            if value.dim() or not _same_everywhere(value):
                return NotImplemented
            if not isinstance(value, nn.Parameter):
                numbers.append(value.item())
        elif isinstance(value, int | float):
            numbers.append(value)
        elif not _keeps_layout(value, first):
            return NotImplemented
    if numbers:
        ranks.agreement.note(*(n if n == n else 0.5 for n in numbers))

    def here(value: Any) -> Any:
        if isinstance(value, ShardedActivation):
            return value.local
        return replicated(value, ranks) if isinstance(value, nn.Parameter) else value

    result = func(*map(here, args), **{key: here(value) for key, value in kwargs.items()})
    if not isinstance(result, Tensor):
        return result
    if writes:
        first._rewritten = True
        increment_version(first)
        return first
    if result is first.local:
        return first
    made = ShardedActivation.wrap(result, first.shape, first.place)
    if name in CASTS and not result.is_meta and result.data_ptr() == first.local.data_ptr():  # type: ignore[union-attr]
        first._relatives.extend(made._relatives)
        made._relatives = first._relatives
    return made


def _same_everywhere(scalar: Tensor) -> bool:
    """Whether ranks hold, or can be seen to hold, the same: a parameter, or a value that is cheap to look at."""
    return isinstance(scalar, nn.Parameter) or (scalar.device.type == "cpu" and not scalar.requires_grad)


def _keeps_layout(value: Any, activation: ShardedActivation) -> bool:
    """Whether an argument that is no number changes nothing but the type."""
    if isinstance(value, torch.memory_format):
        return value in (torch.preserve_format, torch.contiguous_format)
    if isinstance(value, torch.device | str):
        try:
            return torch.device(value) == activation.device
        except RuntimeError:
            return value in ("none", "tanh", "floor", "trunc")  # how gelu approximates, how div rounds
    return value is None or isinstance(value, torch.dtype)


def _by_token(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply any operation to plain tensors."""
    name = _name_of(func)
    if name in RAW_MEMORY or name in REFUSED or (name == "__set__" and isinstance(args[0], ShardedActivation)):
        first = next(_activations_in([*args, *kwargs.values()]))
        raise LayoutError(
            f"{name} reads or replaces the memory of an activation of {first.place.layer!r}, of which each rank holds "
            f"its own features only. Use torch.clone(activation).view_as(activation), which is a plain tensor, or "
            f"leave the layer dense: plan={{{first.place.layer!r}: 'skip', ...}}."
        )
    if isinstance(kwargs.get("out"), ShardedActivation):
        raise LayoutError(f"{name}(out=...) cannot write into an activation of {kwargs['out'].place.layer!r}.")
    target = args[0] if args and isinstance(args[0], ShardedActivation) else None
    writes = target is not None and (
        (name.endswith("_") and not name.endswith("__"))
        or name in IN_PLACE
        or name == "__setitem__"
        or bool(kwargs.get("inplace"))
    )
    if not writes:
        return func(*_plain(args, name), **_plain(kwargs, name))
    assert target is not None
    written = target._become_whole(name)
    result = func(written, *_plain(args[1:], name), **_plain(kwargs, name))
    increment_version(target)
    return target if result is written else result


def _plain(value: Any, reader: str) -> Any:
    if isinstance(value, ShardedActivation):
        return value.whole(reader)
    if type(value) in (list, tuple):
        return type(value)(_plain(v, reader) for v in value)
    if type(value) is dict:
        return {k: _plain(v, reader) for k, v in value.items()}
    return value


def _activations_in(values: Any) -> Iterator[ShardedActivation]:
    for value in values:
        if isinstance(value, ShardedActivation):
            yield value
        elif isinstance(value, list | tuple):
            yield from _activations_in(value)
        elif isinstance(value, dict):
            yield from _activations_in(value.values())


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return owner if name == "__get__" else name


# Gradients: those of an activation are those of `local`, brought to tokens, and of its own node


def _grad(activation: ShardedActivation) -> Tensor | None:
    local = activation.local
    if local is None:
        assert activation._whole is not None
        return activation._whole.grad
    own: Tensor | None = Tensor.grad.__get__(activation)  # type: ignore[union-attr]
    if local.grad is None:
        return own
    place = activation.place
    inside = place.tokens(local.grad, activation.shape, place.gradient_scale)
    return inside if own is None else own + inside


def _register_hook(activation: ShardedActivation, hook: Callable[[Tensor], Tensor | None]) -> Any:
    local, place, shape = activation.local, activation.place, activation.shape
    if local is None:
        assert activation._whole is not None
        return activation._whole.register_hook(hook)

    def inside(grad: Tensor) -> Tensor | None:
        replaced = hook(place.tokens(grad, shape, place.gradient_scale))
        return None if replaced is None else place.features(replaced, 1 / place.gradient_scale)

    return local.register_hook(inside)


def _retain_grad(activation: ShardedActivation) -> None:
    (activation._whole if activation.local is None else activation.local).retain_grad()  # type: ignore[union-attr]


def _require_grad(activation: ShardedActivation, requires_grad: bool = True) -> ShardedActivation:
    held = activation._whole if activation.local is None else activation.local
    assert held is not None
    held.requires_grad_(requires_grad)
    Tensor.requires_grad_(activation, requires_grad)
    return activation


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    asked = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    held = [x.local if isinstance(x, ShardedActivation) and x.local is not None else _plain(x, "grad") for x in asked]
    grads = torch.autograd.grad(_plain(outputs, "grad"), held, *_plain(args, "grad"), **_plain(kwargs, "grad"))
    return tuple(
        x.place.tokens(g, x.shape, x.place.gradient_scale)
        if isinstance(x, ShardedActivation) and x.local is not None and g is not None
        else g
        for x, g in zip(asked, grads, strict=True)
    )


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    with torch.enable_grad():  # the way back to tokens is part of the graph, wherever backward is called
        plain = _plain(tensors, "backward"), *_plain(args, "backward")
    torch.autograd.backward(*plain, **_plain(kwargs, "backward"))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.autograd.backward: _backward,
    Tensor.backward: _backward,
    Tensor.grad.__get__: _grad,  # type: ignore[union-attr]
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: _retain_grad,
    Tensor.requires_grad_: _require_grad,
    Tensor.requires_grad.__set__: lambda activation, flag: _require_grad(activation, flag) and None,  # type: ignore[attr-defined]
    torch.autograd.grad: _autograd_grad,
}


def version_of(x: Tensor) -> int | None:
    """What changes when x is written to; None where torch does not tell."""
    return None if x.is_inference() else x._version


# Who asks

_OURS = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__))


def _line_of_user() -> str:
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _in_autograd_function() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.autograd.Function.apply.__func__.__code__:  # type: ignore[attr-defined]
            return True
        frame = frame.f_back
    return False
