"""Traces the forward of a module by torch.fx, in every mode and with every choice of optional arguments.

A module below it whose own forward cannot be traced, such as an attention, becomes a single opaque call: what goes in
and comes out is seen, what happens inside is not.
"""

from __future__ import annotations

import ast
import gc
import inspect
import itertools
import random
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lightning_phantom.layers.chain import Chain, runs_own_forward
from lightning_phantom.layers.dense import is_linear
from lightning_phantom.plan.elementwise import is_elementwise_module

_MORE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def trace_forward(owner: nn.Module, opaque: set[nn.Module]) -> list[fx.Graph]:
    """Trace `owner` in train and eval mode, with and without gradients, with optional arguments given and left out.

    Args:
        owner: the module whose forward to trace.
        opaque: modules below it that are known not to be traceable; what is found to be so is added.

    Raises:
        Exception: whatever a forward raises when it meets proxies; it cannot be traced.
    """
    if type(owner).__module__.startswith("torch.nn") and type(owner) is not nn.Sequential:
        raise TypeError(f"{type(owner).__name__} is not on the list of known types")
    if not runs_own_forward(owner):
        raise TypeError("its forward was replaced on the instance")
    if getattr(owner, "gradient_checkpointing", False):
        raise TypeError("it recomputes its forward outside its call, for activation checkpointing")
    for name, module in owner.named_modules():
        if name and has_forward_hooks(module):
            raise TypeError(f"{name!r} has forward hooks, which would see one rank's features")
    if not any(p.kind in _MORE for p in _parameters(owner)):
        return _trace_all(owner, opaque, named_only=True)
    try:
        return _trace_all(owner, opaque, named_only=False)
    except Exception:  # proxies have no keys, so a **kwargs cannot be handed on
        receivers = _receivers(owner)
        if receivers is None:
            raise
        opaque.update(receivers)
        return _trace_all(owner, opaque, named_only=True)


def _receivers(owner: nn.Module) -> list[nn.Module] | None:
    """The modules to which the forward of `owner` hands its `**kwargs`; None if it may do anything else with them.

    Once these are opaque, the forward can be traced without extra arguments and is known with them as well.
    """
    forward: Any = type(owner).forward
    while hasattr(forward, "__wrapped__"):
        # What transformers puts around its layers hands all arguments on, unless it recomputes (see trace_forward).
        if forward.__globals__["__name__"] != "transformers.modeling_layers":
            return None
        forward = forward.__wrapped__
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward)))))
    except (OSError, SyntaxError):
        return None
    arguments = inspect.getfullargspec(forward)
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    calls = [
        node.func
        for node in nodes
        if isinstance(node, ast.Call)
        and any(k.arg is None and ast.unparse(k.value) == arguments.varkw for k in node.keywords)
    ]
    if arguments.varargs or "locals" in names or names.count(str(arguments.varkw)) != len(calls):
        return None
    receivers = []
    for function in calls:
        if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != arguments.args[0]:
            return None
        receiver = getattr(owner, function.attr, None)
        if isinstance(receiver, nn.Module) and not is_linear(receiver):
            receivers.append(receiver)
        elif receiver is not None:  # where it is missing, the call fails
            return None
    return receivers


def _parameters(owner: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(owner).forward).parameters.values())


def _trace_all(owner: nn.Module, opaque: set[nn.Module], named_only: bool) -> list[fx.Graph]:
    defaults = {p.name: p.default for p in _parameters(owner) if p.default is not inspect.Parameter.empty}
    variants = list(itertools.product((True, False), (True, False), _left_out(defaults)))
    while True:
        try:
            return [_trace(owner, opaque, named_only, *variant) for variant in variants]
        except _UntraceableError as error:
            if error.module in opaque or is_linear(error.module):
                raise error.cause from None
            opaque.add(error.module)


def _trace(
    owner: nn.Module, opaque: set[nn.Module], named_only: bool, training: bool, grad: bool, left_out: dict[str, Any]
) -> fx.Graph:
    with _untouched(owner), torch.set_grad_enabled(grad):
        for module in owner.modules():
            module.training = training
        return _Tracer(opaque, named_only).trace(owner, left_out or None)


class _UntraceableError(Exception):
    """The innermost module that was being traced when something was raised, and what."""

    def __init__(self, module: nn.Module, cause: Exception) -> None:
        super().__init__(str(cause))
        self.module, self.cause = module, cause


class _Tracer(fx.Tracer):
    """Marks in `meta` what a graph does not show: each node's grad mode, and whether its value outlives the forward."""

    def __init__(self, opaque: set[nn.Module], named_only: bool) -> None:
        super().__init__()
        self._opaque, self._named_only = opaque, named_only
        self._values: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = is_linear(m) or is_elementwise_module(m) or m in self._opaque
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, *args: Any) -> Any:
        assert self.submodule_paths is not None
        if m not in self.submodule_paths:  # made for one call: it has no name under which to be opaque
            return super().call_module(m, *args)
        try:
            return super().call_module(m, *args)
        except _UntraceableError:
            raise
        except Exception as error:  # user code meets proxies here: anything can be raised
            raise _UntraceableError(m, error) from error

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        if not self._named_only:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        given: dict[str, Any] = concrete_args or {}
        positional: list[Any] = [self.root]
        named: dict[str, Any] = {}
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind not in _MORE:
                value = given[p.name] if p.name in given else self.create_proxy("placeholder", p.name, (), {})
                if p.kind is inspect.Parameter.KEYWORD_ONLY:
                    named[p.name] = value
                else:
                    positional.append(value)
        return (lambda *values: root_fn(*values, **named)), positional

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = super().proxy(node)
        self._values.append((node, weakref.ref(value)))
        return value

    def trace(self, *args: Any) -> fx.Graph:
        with _without_cycles():
            graph = super().trace(*args)
        for node, value in self._values:
            node.meta["kept"] = value() is not None
        return graph


def _left_out(defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which optional arguments to leave out: none, all, each alone, all but one; so each pair in each combination."""
    names = frozenset(defaults)
    choices = [frozenset(), names, *(frozenset({n}) for n in names), *(names - {n} for n in names)]
    return [{n: value for n, value in defaults.items() if n in choice} for choice in dict.fromkeys(choices)]


@contextmanager
def _without_cycles() -> Iterator[None]:
    """Free what is left in cycles, as by fx where a forward unpacks a value: the frames of all its callers."""
    enabled = gc.isenabled()
    gc.disable()  # so that all that is made here stays young, and is all that is looked at
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Undo what a traced forward leaves behind: attributes it sets, lists it appends to, numbers it draws."""
    attributes = [vars(m) for m in module.modules()]
    kept: list[tuple[Any, Any]] = [(a, dict(a)) for a in attributes]
    kept += [(v, v.copy()) for a in attributes for v in a.values() if type(v) in (dict, list, set)]
    random_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        random.setstate(python_state)
        for changed, before in kept:
            changed.clear()
            (changed.extend if type(changed) is list else changed.update)(before)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether `module` has hooks around its forward or backward, other than this package's own."""
    hooks = [
        hook
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        for hook in getattr(module, kind).values()
    ]
    return any(not isinstance(getattr(hook, "__self__", None), Chain) for hook in hooks)
