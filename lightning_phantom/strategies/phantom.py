"""PhantomStrategy: trains an unchanged LightningModule with its feed-forward layers in phantom-parallel layout."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from lightning_phantom.config import PhantomConfig, num_blocks_of_environment
from lightning_phantom.distributed.mesh import Sizes, resolve_sizes
from lightning_phantom.errors import PhantomError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import SplitLinear
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.plan.record import Plan
from lightning_phantom.strategies.base import DEFAULT_TIMEOUT, SplitStrategy


class PhantomStrategy(SplitStrategy):
    """Phantom parallelism for the feed-forward layers of any LightningModule; also `Trainer(strategy="phantom")`.

    As under DDP every rank reads its own batches, and gradients are averaged over all ranks. But the feed-forward
    linears a group of R ranks holds between them, in phantom layout.

    Args:
        phantom_width: k, the features each block sends to the others: an `int`, or a fraction of the block width.
        num_blocks: p, a multiple of R. It belongs to the model: any R that divides it trains the same function.
            None takes the environment's PHANTOM_NUM_BLOCKS, or R. `Trainer(strategy="phantom_4")` has 4.
        phantom_parallel_size: R, which divides the number of ranks. `"auto"`: the devices of a node (or what they have
            in common with num_blocks).
        plan: `{"glob of module name": "phantom" | "skip"}`; None finds the feed-forward networks.
        init: how the layers start, see `PhantomConfig`.
        state_dict_type: how checkpoints are saved: `"full"`, one file with dense weights that any strategy can load, or
            `"sharded"`, a directory to which every rank writes its share. Either kind is loaded.
        weights_only: passed to `torch.load` when a checkpoint is resumed, unless `Trainer.fit(weights_only=...)` is.
        check_replicas: compare the replicated parameters of all ranks in the first steps and every 1000, and the first
            batches of a prediction, which the ranks of a group share. `"auto"` and True check, False does not.
        process_group_backend: `"nccl"`, `"gloo"`; None chooses by device.
        timeout: how long a collective waits for a rank before it gives up; at least a minute on busy machines.
        mixing: `"pairwise"` or `"private"`, which latents blocks make for each other, see `PhantomConfig`.
        latents: `"own"`, `"both"` or `"previous"`, which a layer in a chain reads, see `PhantomConfig`.
        accelerator: set by the Trainer, like the other arguments below.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer.
        checkpoint_io: set by the Trainer.
        precision_plugin: set by the Trainer.
        ddp_kwargs: for DistributedDataParallel.

    Raises:
        PhantomError: an argument is impossible, here or, where it needs the number of ranks, at the start of a run.

    Examples:
        >>> trainer = L.Trainer(strategy=PhantomStrategy(num_blocks=4), accelerator="cpu", devices=1)
    """

    strategy_name = layer_kind = "phantom"

    def __init__(
        self,
        phantom_width: int | float = 0.25,
        num_blocks: int | None = None,
        phantom_parallel_size: int | Literal["auto"] = "auto",
        plan: dict[str, str] | None = None,
        init: str = "auto",
        state_dict_type: Literal["full", "sharded"] = "full",
        weights_only: bool | None = None,
        check_replicas: Literal["auto"] | bool = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        mixing: Literal["pairwise", "private"] = "pairwise",
        latents: Literal["own", "both", "previous"] = "own",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        **ddp_kwargs: Any,
    ) -> None:
        if num_blocks is None:
            num_blocks = num_blocks_of_environment()
        # With the number of blocks still open the rest is checked all the same.
        self._request = PhantomConfig(
            2 if num_blocks is None else num_blocks, phantom_width, plan, init, mixing=mixing, latents=latents
        )
        super().__init__(
            "phantom_parallel_size",
            phantom_parallel_size,
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
        self._num_blocks = num_blocks
        self._sizes: Sizes | None = None

    @property
    def config(self) -> PhantomConfig:
        """What is asked for, with the number of blocks and the seed settled; from the first run on."""
        if self._sizes is None or self._seed is None:
            raise PhantomError("the number of blocks and the seed are settled at the start of the Trainer's first run.")
        return replace(self._request, num_blocks=self._sizes.num_blocks, seed=self._seed)

    @property
    def phantom_parallel_size(self) -> int:
        """R: how many ranks hold each phantom layer between them."""
        return self.mesh.phantom.size

    def _settle_sizes(self) -> Sizes:
        self._sizes = resolve_sizes(self._size, self._num_blocks, self.num_processes, self.num_nodes)
        return self._sizes

    def _plan(self, module: nn.Module, config: PhantomConfig) -> Plan:
        return plan_phantom(module, config)

    def _check_layer(self, name: str, layer: SplitLinear, config: PhantomConfig) -> None:
        if not isinstance(layer, PhantomLinear):
            raise PhantomError(f"{name!r} is a {layer.kind} layer already. Use densify(module).")
        if (layer.num_blocks, layer.ranks.size) != (config.num_blocks, self.mesh.phantom.size):
            raise PhantomError(
                f"{name!r} is a phantom layer of {layer.num_blocks} blocks on {layer.ranks.size} ranks already; "
                f"this strategy asks for {config.num_blocks} on {self.mesh.phantom.size}. Use densify(module)."
            )
