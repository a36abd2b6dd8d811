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

# The same library under two names, each with its own registry.
REGISTRIES = {"lightning.pytorch.strategies": "lightning.pytorch", "pytorch_lightning.strategies": "pytorch_lightning"}
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
        for name in REGISTRIES:
            if name in sys.modules:
                _add_names(sys.modules[name])


class _Finder:
    """Finds the modules that hold a registry where others do, and adds the names once they have run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in REGISTRIES:
            return None
        with suppress(Exception):
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run = partial(_run, spec.loader.exec_module)
                spec.loader.exec_module = run  # type: ignore[method-assign]
            return spec
        return None


def _run(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    exec_module(module)
    with suppress(Exception):
        _add_names(module)


def _add_names(module: ModuleType) -> None:
    for name, (strategy, arguments) in NAMES.items():
        if name not in module.StrategyRegistry:
            make = partial(_make, REGISTRIES[module.__name__], strategy)
            module.StrategyRegistry.register(name, make, f"lightning_phantom.{strategy}", **arguments)


def _make(lightning: str, strategy: str, **arguments: int) -> Any:
    import_module("lightning_phantom.framework").settle(lightning)
    return getattr(import_module("lightning_phantom"), strategy)(**arguments)
