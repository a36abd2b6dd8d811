"""What an operation on activations between ranks is done on: features, plain tensors, or what has the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lightning_phantom.distributed.exchange import replicated
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.errors import LayoutError
from lightning_phantom.layers.elementwise import IN_PLACE, RAW_MEMORY, REFUSED
from lightning_phantom.layers.held import Held, in_autograd_function


def answer(func: Any, args: Any, kwargs: Any) -> Any:
    """Answer a question about an activation."""
    first = args[0]
    if isinstance(first, Held) and first.local is None:
        args = (first._whole, *args[1:])
    return func(*args, **kwargs)


def by_feature(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Apply an operation of the table to what this rank holds; NotImplemented where it would not be the same."""
    values = [*args, *kwargs.values()]
    activations = list(activations_in(values))
    first = activations[0]
    ranks, rows, _, parts = first.place
    writes = name in IN_PLACE or bool(kwargs.get("inplace"))
    if "out" in kwargs:
        return NotImplemented
    if writes and any(other._whole is not None for other in first.sharing_memory()):
        return NotImplemented  # what was brought back may have views
    if not are_inside(activations):
        return NotImplemented
    for activation in activations:
        place = activation.place
        if (
            activation.shape != first.shape
            or place.rows.counts != rows.counts
            or place.parts != parts
            or place.ranks.process_group is not ranks.process_group
        ):
            return NotImplemented
    numbers: list[float] = []
    for value in values:
        if isinstance(value, Held):
            continue
        if isinstance(value, nn.Parameter):
            if not goes_along(value, first):
                return NotImplemented
        elif isinstance(value, Tensor):
            if value.dim() or not _is_seen_through(value):
                return NotImplemented
            numbers.append(value.item())
        elif isinstance(value, int | float):
            numbers.append(value)
        elif not _keeps_layout(value, first):
            return NotImplemented
    if numbers:
        ranks.agreement.note(*(n if n == n else 0.5 for n in numbers))

    def here(value: Any) -> Any:
        if isinstance(value, Held):
            return value.local
        return share_of(value, ranks) if isinstance(value, nn.Parameter) else value

    result = func(*map(here, args), **{key: here(value) for key, value in kwargs.items()})
    if not isinstance(result, Tensor):
        return result
    if writes:
        first._rewritten = True
        increment_version(first)
        return first
    if result is first.local:
        return first
    if result.shape != first.local.shape:  # type: ignore[union-attr]
        return NotImplemented  # what an activation was only asked of, such as its type
    made = first.wrap(result, first.shape, first.place)
    if torch._C._is_alias_of(result, first.local):  # type: ignore[attr-defined]
        first._relatives.extend(made._relatives)
        made._relatives = first._relatives
    return made


def are_inside(activations: Sequence[Held]) -> bool:
    """Whether an operation may be done on what this rank holds of activations."""
    if not torch.is_grad_enabled() and any(a.requires_grad for a in activations) and in_autograd_function():
        return False  # autograd takes what comes out for a tensor of its own
    for activation in activations:
        activation.settle()
    return all(activation.local is not None for activation in activations)


def goes_along(parameter: Tensor, activation: Held) -> bool:
    """Whether a parameter has one number for all features, or one for each, and meets them along the last dimension."""
    width = parameter.shape[-1] if parameter.dim() else 1
    is_one_row = parameter.numel() == width and parameter.dim() <= activation.dim()
    return is_one_row and (width == 1 or (width == activation.shape[-1] and activation.place.parts == 1))


def share_of(parameter: Tensor, ranks: Ranks) -> Tensor:
    """What belongs to this rank's features of a parameter that every rank holds: one number, or one for each feature.

    Parameters are the same on all ranks; of another tensor nothing is known.
    """
    parameter = replicated(parameter, ranks)
    if parameter.numel() == 1:
        return parameter.reshape(parameter.shape[-1:])
    return parameter.reshape(-1)[ranks.slice_of(parameter.numel())]


def _is_seen_through(scalar: Tensor) -> bool:
    """Whether a value is cheap to look at, to see that ranks hold the same."""
    return scalar.device.type == "cpu" and not scalar.requires_grad


def _keeps_layout(value: Any, activation: Held) -> bool:
    """Whether an argument that is no number changes nothing but the type."""
    if isinstance(value, torch.memory_format):
        return value in (torch.preserve_format, torch.contiguous_format)
    if isinstance(value, torch.device | str):
        try:
            return torch.device(value) == activation.device
        except RuntimeError:
            return value in ("none", "tanh", "floor", "trunc")  # how gelu approximates, how div rounds
    return value is None or isinstance(value, torch.dtype)


def by_token(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply any operation to plain tensors."""
    name = _name_of(func)
    if name in RAW_MEMORY or name in REFUSED or name == "__set__":
        first = next(activations_in([*args, *kwargs.values()]))
        raise LayoutError(
            f"{name} reads or replaces the memory of an activation of {first.place.layer!r}, of which each rank holds "
            f"its own features only. Use torch.clone(activation).view_as(activation), which is a plain tensor, or "
            f"leave the layer dense: plan={{{first.place.layer!r}: 'skip', ...}}."
        )
    if isinstance(kwargs.get("out"), Held):
        raise LayoutError(f"{name}(out=...) cannot write into an activation of {kwargs['out'].place.layer!r}.")
    writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or bool(kwargs.get("inplace"))
    target = args[0] if args else None
    if not writes or not isinstance(target, Held):
        return func(*plain(args, name), **plain(kwargs, name))
    written = target.become_whole(name)
    func(written, *plain(args[1:], name), **plain(kwargs, name))
    increment_version(target)
    return target


def plain(value: Any, reader: str) -> Any:
    """`value` with plain tensors in place of activations; `reader` names what wants them."""
    if isinstance(value, Held):
        return value.whole(reader)
    if type(value) in (list, tuple):
        return type(value)(plain(v, reader) for v in value)
    if type(value) is dict:
        return {k: plain(v, reader) for k, v in value.items()}
    return value


def activations_in(values: Any) -> Iterator[Held]:
    """The activations among arguments."""
    for value in values:
        if isinstance(value, Held):
            yield value
        elif isinstance(value, list | tuple):
            yield from activations_in(value)


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return owner if name == "__get__" else name


# Gradients: those of an activation are those of `local`, brought to tokens, and of its own node


def _grad(activation: Held) -> Tensor | None:
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


def _register_hook(activation: Held, hook: Callable[[Tensor], Tensor | None]) -> Any:
    local, place, shape = activation.local, activation.place, activation.shape
    if local is None:
        assert activation._whole is not None
        return activation._whole.register_hook(hook)

    def inside(grad: Tensor) -> Tensor | None:
        replaced = hook(place.tokens(grad, shape, place.gradient_scale))
        return None if replaced is None else place.features(replaced, 1 / place.gradient_scale)

    return local.register_hook(inside)


def _retain_grad(activation: Held) -> None:
    (activation._whole if activation.local is None else activation.local).retain_grad()  # type: ignore[union-attr]


def _require_grad(activation: Held, requires_grad: bool = True) -> Held:
    held = activation._whole if activation.local is None else activation.local
    assert held is not None
    held.requires_grad_(requires_grad)
    Tensor.requires_grad_(activation, requires_grad)
    return activation


def _set_requires_grad(activation: Held, requires_grad: bool) -> None:
    _require_grad(activation, requires_grad)


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    asked = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    held = [x.local if isinstance(x, Held) and x.local is not None else plain(x, "grad") for x in asked]
    grads = torch.autograd.grad(plain(outputs, "grad"), held, *plain(args, "grad"), **plain(kwargs, "grad"))
    return tuple(
        x.place.tokens(g, x.shape, x.place.gradient_scale)
        if isinstance(x, Held) and x.local is not None and g is not None
        else g
        for x, g in zip(asked, grads, strict=True)
    )


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    with torch.enable_grad():  # the way back to tokens is part of the graph, wherever backward is called
        ends = plain(tensors, "backward"), *plain(args, "backward")
    torch.autograd.backward(*ends, **plain(kwargs, "backward"))


SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.autograd.backward: _backward,
    Tensor.backward: _backward,
    Tensor.grad.__get__: _grad,  # type: ignore[union-attr]
    Tensor.register_hook: _register_hook,
    Tensor.retain_grad: _retain_grad,
    Tensor.requires_grad_: _require_grad,
    Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.autograd.grad: _autograd_grad,
}
