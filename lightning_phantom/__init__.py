"""Phantom parallelism for PyTorch Lightning: `import lightning_phantom`, then `Trainer(strategy="phantom")`.

Importing the package registers `"phantom"` and `"tensor_parallel"`. It imports no codecarbon and touches no device.
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
