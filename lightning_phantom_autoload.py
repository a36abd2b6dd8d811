"""The strategies' names, which Lightning knows from its import on, though nothing of this package is imported yet.

torch calls `register` at its own import (an entry point of the group `torch.backends`): so this file imports the
standard library alone, and nothing that goes wrong in it may be heard. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches the
call off.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# By name: the class, and arguments for it.
NAMES: dict[str, tuple[str, dict[str, int]]] = {
    "phantom": ("PhantomStrategy", {}),
    **{f"phantom_{p}": ("PhantomStrategy", {"num_blocks": p}) for p in (2, 4, 8, 16, 32, 64)},
    "tensor_parallel": ("TensorParallelStrategy", {}),
}


def register() -> None:
    """Make the names known where Lightning has been imported, and where it will be."""
    with suppress(Exception):
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        for name in _TO_DO:
            if name in sys.modules:
                _finish(sys.modules[name])


class _Finder:
    """Finds the modules of Lightning that concern us where others do, and does what is to do once they have run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in _TO_DO:
            return None
        with suppress(Exception):
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = partial(_run, spec.loader.exec_module)  # type: ignore[method-assign]
            return spec
        return None


def _run(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    exec_module(module)
    _finish(module)


def _finish(module: ModuleType) -> None:
    with suppress(Exception):
        _TO_DO[module.__name__](module)


def _add_names(module: ModuleType) -> None:
    for name, (strategy, arguments) in NAMES.items():
        if name not in module.StrategyRegistry:
            make = partial(_make, module.__name__.rpartition(".")[0], strategy)
            module.StrategyRegistry.register(name, make, f"lightning_phantom.{strategy}", **arguments)


def _make(lightning: str, strategy: str, **arguments: int) -> Any:
    return _classes(lightning)[strategy](**arguments)


def _classes(lightning: str) -> dict[str, Callable[..., Any]]:
    import_module("lightning_phantom.framework").settle(lightning)
    package = import_module("lightning_phantom")
    return {name: getattr(package, name) for name, _ in NAMES.values()}


def _show_classes(module: ModuleType) -> None:
    """LightningCLI knows a class by its last name alone if it has been imported."""
    if "lightning_phantom" in sys.modules:
        _classes(module.__name__.rpartition(".")[0])


# The same library under two names, each with a registry and a command line of its own.
_TO_DO = {
    f"{lightning}.{module}": do
    for lightning in ("lightning.pytorch", "pytorch_lightning")
    for module, do in (("strategies", _add_names), ("cli", _show_classes))
}
