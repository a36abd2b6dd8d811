"""TensorParallelStrategy: trains an unchanged LightningModule with its feed-forward layers split exactly."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.distributed.mesh import Sizes, share_out
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.layers.tensor_parallel import ParallelLinear
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.plan.record import Plan
from lightning_phantom.strategies.base import DEFAULT_TIMEOUT, SplitStrategy


class TensorParallelStrategy(SplitStrategy):
    """Tensor parallelism for the feed-forward layers of a LightningModule; `Trainer(strategy="tensor_parallel")`.

    The exact counterpart of `PhantomStrategy`, to compare it with: the same linears, found alike, in the same training,
    but each computes the dense layer that it was. As under DDP every rank reads its own batches, and gradients are
    averaged over all ranks; a group of R ranks holds each layer between them.

    On any R it trains the dense model, but for the masks of dropout.

    Args:
        tensor_parallel_size: R, which divides the number of ranks. `"auto"`: the devices of a node. 1 is dense.
        plan: `{"glob of module name": "phantom" | "skip"}`: which layers to split; None finds the feed-forward nets.
        style: `"megatron"`, pairs of a column- and a row-parallel layer: tokens are gathered before and the sum is
            scattered after each; or `"layerwise"`, column-parallel layers that gather their input.
        state_dict_type: how checkpoints are saved: `"full"`, one file with dense weights that any strategy can load, or
            `"sharded"`, a directory to which every rank writes its share. Either kind is loaded.
        weights_only: passed to `torch.load` when a checkpoint is resumed, unless `Trainer.fit(weights_only=...)` is.
        check_replicas: compare the replicated parameters of all ranks in the first steps and every 1000, and the first
            batches of a prediction, which the ranks of a group share. `"auto"` and True check, False does not.
        process_group_backend: `"nccl"`, `"gloo"`; None chooses by device.
        timeout: how long a collective waits for a rank before it gives up; at least a minute on busy machines.
        accelerator: set by the Trainer, like the other arguments below.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer.
        checkpoint_io: set by the Trainer.
        precision_plugin: set by the Trainer.
        ddp_kwargs: for DistributedDataParallel.

    Raises:
        PhantomError: an argument is impossible, here or, where it needs the number of ranks, at the start of a run.

    Examples:
        >>> trainer = L.Trainer(strategy=TensorParallelStrategy(style="layerwise"), accelerator="cpu", devices=1)
    """

    strategy_name = "tensor_parallel"
    layer_kind = "tensor-parallel"

    def __init__(
        self,
        tensor_parallel_size: int | Literal["auto"] = "auto",
        plan: dict[str, str] | None = None,
        style: Literal["megatron", "layerwise"] = "megatron",
        state_dict_type: Literal["full", "sharded"] = "full",
        weights_only: bool | None = None,
        check_replicas: Literal["auto"] | bool = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **ddp_kwargs: Any,
    ) -> None:
        # With the number of ranks still open the rest is checked all the same.
        self._request = TensorParallelConfig(1, plan, style)
        super().__init__(
            "tensor_parallel_size",
            tensor_parallel_size,
            state_dict_type,
            weights_only,
            check_replicas,
            timeout,
            checkpoint_io,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            **ddp_kwargs,
        )

    @property
    def config(self) -> TensorParallelConfig:
        """What is asked for, with the number of ranks and the seed settled; from the first run on."""
        if self._seed is None:
            raise PhantomError("the number of ranks and the seed are settled at the start of the Trainer's first run.")
        return replace(self._request, num_ranks=self.tensor_parallel_size, seed=self._seed)

    @property
    def tensor_parallel_size(self) -> int:
        """R: how many ranks hold each layer between them."""
        return self.mesh.phantom.size

    def _settle_sizes(self) -> Sizes:
        ranks, groups = share_out("tensor_parallel_size", self._size, self.num_processes, self.num_nodes)
        return Sizes(ranks, groups, ranks)

    def _plan(self, module: nn.Module, config: TensorParallelConfig) -> Plan:
        return plan_tensor_parallel(module, config)

    def _check_layer(self, name: str, layer: SplitLinear, config: TensorParallelConfig) -> None:
        if not isinstance(layer, ParallelLinear):
            raise PhantomError(f"{name!r} is a {layer.kind} layer already. Use densify(module).")
        if layer.ranks.size != self.tensor_parallel_size:
            raise PhantomError(
                f"{name!r} is a tensor-parallel layer on {layer.ranks.size} ranks already; this strategy asks for "
                f"{self.tensor_parallel_size}. Use densify(module)."
            )
