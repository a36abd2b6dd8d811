"""Which linears have their weight or bias read by a module above them, past their forward.

A layer that is split has other weights than the linear whose place it takes; who computes with them, or changes them
(RWKV divides its deeper layers' by powers of two for inference), would get others, too. Forwards are read, not run, and
the methods that they call.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from types import SimpleNamespace

from torch import nn

_WEIGHT = re.compile(r"(\w+)\.(\w+(?:\.\w+)*)\.(?:weight|bias)")
_CALLED = re.compile(r"\bself\.(\w+)\(")
# What may be asked of a weight: a layer that is split gives the same answer.
_QUESTIONS = ("dtype", "device", "requires_grad", "is_meta", "is_floating_point")


def read_by_parents(root: nn.Module) -> dict[nn.Module, str]:
    """The modules whose weight the forward of a module above them computes with, and who does so."""
    found: dict[nn.Module, str] = {}
    for name, owner in root.named_modules():
        if isinstance(owner, nn.MultiheadAttention):  # hands them to a fused kernel
            found.update(dict.fromkeys(owner.children(), f"{type(owner).__name__} {name!r} itself"))
        reads = _Reads(owner)
        for body in _bodies_of(type(owner)):  # type: ignore[arg-type]
            reads.visit(body)
        for path in reads.found:
            try:
                found[owner.get_submodule(path)] = f"the forward of {name or 'the root module'!r} itself"
            except AttributeError:  # the weight of something that is no module
                continue
    return found


@cache
def _bodies_of(cls: type[nn.Module]) -> list[ast.AST]:
    """The forward of a class and the methods that it calls, those that name a weight of another module."""
    bodies: list[ast.AST] = []
    names = ["forward"]
    for name in names:
        method = getattr(cls, name, None)
        if getattr(method, "__module__", "torch.nn").startswith("torch."):  # see `plan.transformer` for what those read
            continue
        try:
            source = textwrap.dedent(inspect.getsource(method))  # type: ignore[arg-type]
            bodies += [ast.parse(source)] if _WEIGHT.search(source) else []
        except (OSError, TypeError, SyntaxError):
            continue
        names += [called for called in dict.fromkeys(_CALLED.findall(source)) if called not in names]
    return bodies


class _Reads(ast.NodeVisitor):
    """Collects the paths of modules whose weight or bias a forward computes with."""

    def __init__(self, owner: nn.Module) -> None:
        self.found: set[str] = set()
        self._owner = owner
        self._lists = {"self": [""]}  # the paths of the modules that a name stands for, each with a dot behind it

    def visit_For(self, node: ast.For) -> None:
        looped = re.fullmatch(r"(?:enumerate\()?self\.([\w.]+)\)?", ast.unparse(node.iter))
        named = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
        if looped and isinstance(named, ast.Name):
            with suppress(AttributeError):
                inside = self._owner.get_submodule(looped[1]).named_children()
                self._lists[named.id] = [f"{looped[1]}.{name}." for name, _ in inside]
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        decided = _decided(node.test, self._owner)
        self.visit(node.test)
        if decided is not False:
            self._visit_all(node.body)
        if decided is not True:
            self._visit_all(node.orelse)

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _QUESTIONS and _WEIGHT.fullmatch(ast.unparse(node.value)):
            return
        if (read := _WEIGHT.fullmatch(ast.unparse(node))) and read[1] in self._lists:
            self.found.update(path + read[2] for path in self._lists[read[1]])
        else:
            self.generic_visit(node)

    def _visit_all(self, nodes: ast.AST | Iterable[ast.AST]) -> None:
        for node in [nodes] if isinstance(nodes, ast.AST) else nodes:
            self.visit(node)


_LOGIC = (ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.Constant, ast.expr_context)


def _decided(test: ast.expr, owner: nn.Module) -> bool | None:
    """What a condition on plain values of a module comes to; None if it asks for more than those, or for the mode."""
    values = {k: v for k, v in vars(owner).items() if type(v) in (bool, int, float, str) and k != "training"}
    for node in ast.walk(test):
        mine = isinstance(node, ast.Attribute) and node.attr in values
        if not (mine or isinstance(node, _LOGIC) or (isinstance(node, ast.Name) and node.id == "self")):
            return None
    return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {}, {"self": SimpleNamespace(**values)}))
