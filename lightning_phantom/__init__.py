"""Phantom parallelism for PyTorch Lightning: `import lightning_phantom`, then `Trainer(strategy="phantom")`.

Importing the package registers `"phantom"` and `"tensor_parallel"`. It imports no codecarbon and touches no device.

The wings, each on those before it (`energy` on `errors` alone); every wing's own `__init__` says what lies in it:

    errors, config  what is refused, what is asked for
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

from lightning.pytorch.strategies import StrategyRegistry

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

PhantomStrategy.register_strategies(StrategyRegistry)
TensorParallelStrategy.register_strategies(StrategyRegistry)
