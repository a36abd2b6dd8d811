"""How a Trainer is made to train by methods other than this package's strategies."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.cost.count import TENSOR_PARALLEL
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.plan.record import Plan

# The styles of TensorParallelStrategy, by method.
STYLES: dict[str, Literal["megatron", "layerwise"]] = {
    "tensor_parallel": "megatron",
    "tensor_parallel_layerwise": "layerwise",
}


class FullySharded(pl.strategies.ModelParallelStrategy):
    """Lightning's own FSDP, with the LightningModule as its root."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Enter the root by its forward, where the gathering of weights begins."""
        assert self.model is not None and self.lightning_module is not None
        with self.precision_plugin.train_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        assert self.model is not None and self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "validation_step", *args, **kwargs)


def shard_fully(module: Any) -> None:
    """Have `FullySharded` cut every element of the outermost lists of modules, and what is left with the root."""
    own_hook = module.configure_model

    def configure_model() -> None:
        from torch.distributed.fsdp import fully_shard

        own_hook()
        mesh = module.device_mesh["data_parallel"]
        for block in _blocks(module):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    module.configure_model = configure_model


def _blocks(module: nn.Module) -> list[nn.Module]:
    """What repeats: elements of a ModuleList or a Sequential that have parameters, none within another."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [child for child in module if any(True for _ in child.parameters())]
    return [block for child in module.children() for block in _blocks(child)]


class SharedBatches(pl.strategies.ModelParallelStrategy):
    """Torch's own tensor parallelism, whose ranks all read what ranks with batches of their own read together."""

    def process_dataloader(self, dataloader: object) -> object:
        """Make batches as many times larger as there are ranks; of the same samples, as the sampler has their order.

        Raises:
            PhantomError: the loader's batches are no lists of samples that a sampler has drawn.
        """
        loader = super().process_dataloader(dataloader)
        if (
            type(loader) is not DataLoader
            or loader.batch_size is None
            or not isinstance(loader.sampler, DistributedSampler)
        ):
            raise PhantomError(
                f"its ranks read the same batches, and of a {type(loader).__name__} none can be made that hold the "
                f"batches of all ranks. It takes a DataLoader with a batch_size, and Lightning's distributed sampler."
            )
        batches = BatchSampler(loader.sampler, loader.batch_size * self.world_size, loader.drop_last)
        kept = "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context generator".split()
        kept += ["prefetch_factor", "persistent_workers"]
        settings = {name: getattr(loader, name) for name in kept}
        return DataLoader(loader.dataset, batch_sampler=batches, **settings)


def torch_plan(module: nn.Module, num_ranks: int) -> tuple[Plan, dict[str, Any]]:
    """Megatron's pairs in the words of torch.distributed.tensor.parallel.

    Raises:
        PhantomError: a layer has layouts that torch's two styles do not have, or there is none.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = plan_tensor_parallel(module, TensorParallelConfig(num_ranks))
    styles: dict[str, Any] = {}
    for ffn in plan.ffns:
        exits: set[bool] = set()  # of the column-parallel layers so far
        for group in sorted(ffn.groups, key=lambda group: group.depth):
            if group.depth % 2 == 0:
                # To torch a norm's weight is for all features, and a gate's are not beside those of what it gates.
                whole = group.exits or group.parts == 2 or bool(group.norms)
                exits.add(whole)
                style: Any = ColwiseParallel(output_layouts=Replicate() if whole else Shard(-1))
            elif len(exits) > 1 and not (group.enters or group.gated or group.normed):
                raise PhantomError(
                    f"{group.names[0]!r} may read what lies in two ways at once, for which torch has no style."
                )
            else:
                given = group.enters or group.gated or group.normed or True in exits
                style = RowwiseParallel(input_layouts=Replicate() if given else Shard(-1))
            styles.update(dict.fromkeys(group.names, style))
    if not styles:
        raise PhantomError(f"nothing in {type(module).__name__} qualifies for tensor parallelism.")
    return plan, styles


def cannot_divide(module: nn.Module, num_ranks: int) -> dict[str, str]:
    """The methods of tensor parallelism that cannot train a module, and why."""
    try:
        torch_plan(module, num_ranks)
    except PhantomError as error:
        by_ours = plan_tensor_parallel(module, TensorParallelConfig(num_ranks)).swapped
        return dict.fromkeys(("tensor_parallel_torch",) if by_ours else TENSOR_PARALLEL, str(error))
    return {}


def parallelise_with_torch(module: Any) -> None:
    """Have Lightning's ModelParallelStrategy split the same linears with torch's own parallelize_module."""
    own_hook = module.configure_model

    def configure_model() -> None:
        from torch.distributed.tensor.parallel import parallelize_module

        own_hook()
        mesh = module.device_mesh["tensor_parallel"]
        parallelize_module(module, mesh, torch_plan(module, mesh.size())[1])

    module.configure_model = configure_model
