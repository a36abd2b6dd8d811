"""How a Trainer is made to train by methods other than this package's strategies."""

from __future__ import annotations

from typing import Any, Literal

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.errors import PhantomError
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.plan.record import Plan

# The styles of TensorParallelStrategy, by method.
STYLES: dict[str, Literal["megatron", "layerwise"]] = {
    "tensor_parallel": "megatron",
    "tensor_parallel_layerwise": "layerwise",
}


class Alone(LightningEnvironment):
    """The surroundings of one rank among several: it is alone in its world, and the launcher's variables stay."""

    def teardown(self) -> None:
        """Remove nothing: the next run needs the launcher's WORLD_SIZE."""


class OneRank(DDPStrategy):
    """One rank alone, that reads the batches in the order of several: Lightning gives a lone device another sampler."""

    def configure_ddp(self) -> None:
        """Wrap nothing: there are no gradients to average."""


def torch_plan(module: nn.Module, num_ranks: int) -> tuple[Plan, dict[str, Any]]:
    """Megatron's pairs in the words of torch.distributed.tensor.parallel.

    Raises:
        PhantomError: a layer has layouts that torch's two styles do not have, or there is none.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = plan_tensor_parallel(module, TensorParallelConfig(num_ranks))
    chained = {name: both for chain in plan.chains for name, both in chain.layouts(plan.replicated(chain)).items()}
    styles: dict[str, Any] = {}
    for layer in plan.swapped:
        match chained.get(layer.name, ("replicated", "replicated")):
            case ("sharded", "replicated"):
                styles[layer.name] = RowwiseParallel()
            case ("replicated", layout):
                styles[layer.name] = ColwiseParallel(output_layouts=Shard(-1) if layout == "sharded" else Replicate())
            case layouts:
                raise PhantomError(f"{layer.name!r} is {layouts[0]} -> {layouts[1]}, which torch has no style for.")
    if not styles:
        raise PhantomError(f"nothing in {type(module).__name__} qualifies for tensor parallelism.")
    return plan, styles


def parallelise_with_torch(module: Any) -> None:
    """Have Lightning's ModelParallelStrategy split the same linears with torch's own parallelize_module."""
    own_hook = module.configure_model

    def configure_model() -> None:
        from torch.distributed.tensor.parallel import parallelize_module

        own_hook()
        mesh = module.device_mesh["tensor_parallel"]
        parallelize_module(module, mesh, torch_plan(module, mesh.size())[1])

    module.configure_model = configure_model
