"""Phantom parallelism for PyTorch Lightning: `import lightning_phantom`, then `Trainer(strategy="phantom")`.

Importing the package makes `"phantom"` and `"tensor_parallel"` known to Lightning, by whichever of its names a program
imports it (`framework`). It imports neither Lightning nor torch: the public names do, when they are first used.

The wings, each on those before it (`energy` on `errors` and `framework` alone); every wing's own `__init__` says what
lies in it:

    errors, config  what is refused, what is asked for
    framework       Lightning, by the name that the program uses; no other file imports it
    distributed     the ranks: groups, collectives, gradients, replicas
    cost            arithmetic: what a layer costs by each method, counted and predicted
    layers          the algebra: phantom, tensor-parallel, and the protocol that both follow
    plan            what would happen to a module; nothing is touched
    checkpoints     the saved format, and whole files whatever happens
    measure         this machine's own numbers
    swap            a plan carried out, and taken back
    conversion      dense checkpoints to phantom ones and back, offline
    strategies      Lightning
    commands        the command line
    energy          what a fit costs in joules
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning_phantom_autoload

if TYPE_CHECKING:
    from lightning_phantom.config import PhantomConfig
    from lightning_phantom.cost import estimate_cost
    from lightning_phantom.energy import EnergyMonitor
    from lightning_phantom.layers.phantom import PhantomLinear
    from lightning_phantom.plan.finder import plan_phantom
    from lightning_phantom.strategies.phantom import PhantomStrategy
    from lightning_phantom.strategies.tensor_parallel import TensorParallelStrategy
    from lightning_phantom.swap import densify, phantomize_

__version__ = "0.1.0"

__all__ = [
    "EnergyMonitor",
    "PhantomConfig",
    "PhantomLinear",
    "PhantomStrategy",
    "TensorParallelStrategy",
    "densify",
    "estimate_cost",
    "phantomize_",
    "plan_phantom",
]

_MODULES = {
    "EnergyMonitor": "energy",
    "PhantomConfig": "config",
    "PhantomLinear": "layers.phantom",
    "PhantomStrategy": "strategies.phantom",
    "TensorParallelStrategy": "strategies.tensor_parallel",
    "densify": "swap",
    "estimate_cost": "cost",
    "phantomize_": "swap",
    "plan_phantom": "plan.finder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


lightning_phantom_autoload.register()
