"""What the ranks of a run do together: whose batches they read, whose gradients they average, and what they compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_phantom.distributed.gradients import ShardAverage, clip_grad_norm_
from lightning_phantom.distributed.replicas import ReplicaCheck
from lightning_phantom.distributed.shards import Split
from lightning_phantom.framework import pl
from lightning_phantom.strategies.agree import average_shards, has_replicated
from lightning_phantom.strategies.first_step import FirstStep
from lightning_phantom.strategies.saving import CheckpointingStrategy


class RunningStrategy(CheckpointingStrategy):
    """A strategy whose ranks read their own batches, as under DDP, and hold some layers between them.

    Args:
        check_replicas: whether to compare what all ranks must share.
        args: for CheckpointingStrategy, as the following.
        kwargs: for DDPStrategy.
    """

    def __init__(self, check_replicas: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_replicas = check_replicas
        self._check: ReplicaCheck | None = None
        self._sharded: dict[int, Split] = {}
        self._frozen: list[nn.Parameter] = []
        self._average: ShardAverage | None = None
        self._first_step: FirstStep | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, in a pickle or not: the next run finds its ranks, and what they do together, anew."""
        of_this_run = dict.fromkeys(("_mesh", "_check", "_average", "_first_step"))
        return {**super().__getstate__(), **of_this_run, "_sharded": {}, "_frozen": []}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """As under DDP; but in prediction, where ranks get unequal numbers of batches, a group's read the same."""
        if self._predicting:
            groups = self.mesh.data_parallel
            return {"num_replicas": groups.size, "rank": groups.rank}
        return super().distributed_sampler_kwargs

    @property
    def _predicting(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.fn == pl.trainer.states.TrainerFn.PREDICTING

    # Gradients

    def configure_ddp(self) -> None:
        """Average gradients: replicated parameters' over all ranks, shards' over the groups."""
        module = self._module
        self._frozen = [p for p in module.parameters() if not p.requires_grad]
        if self._average is not None:
            self._average.remove()
        self._average = average_shards(module, self.mesh)
        if has_replicated(module):
            super().configure_ddp()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients accumulate."""
        if self._average is not None:
            self._average.blocked = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            if self._average is not None:
                self._average.blocked = False

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the whole model; for a `configure_gradient_clipping` of your own.

        Returns:
            The norm before clipping, equal on every rank.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return clip_grad_norm_(parameters, max_norm, self._sharded, norm_type)

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        self.clip_grad_norm_(self.precision_plugin.main_params(optimizer), clip_val)

    # Steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, and check that ranks which must agree do."""
        module = self._module
        if any(p.requires_grad for p in self._frozen):
            # A finetuning callback has unfrozen what was found frozen and would not be averaged.
            self.model = module
            if self.world_size > 1:
                self.configure_ddp()
        self._report_first_step()
        with nullcontext() if self._first_step is None else self._first_step.watching():
            output = super().training_step(*args, **kwargs)
        if self._check is not None:
            # After DistributedDataParallel has had its say of parameters without a gradient, which it did not average.
            self._check.step(module, self._sharded)
        return output

    def on_train_end(self) -> None:
        """Report on the first step where there was no second."""
        super().on_train_end()
        self._report_first_step()

    def _report_first_step(self) -> None:
        if self._first_step is not None and self._first_step.is_over:
            self._first_step.report()
            self._first_step = None

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on a batch that the ranks of a group share."""
        group = self.mesh.phantom
        if group.size == 1:
            return super().predict_step(*args, **kwargs)
        if self._check is not None and args:
            self._check.batch("prediction", args[0])
        group.agreement.shared_batches = True
        try:
            return super().predict_step(*args, **kwargs)
        finally:
            group.agreement.shared_batches = False

    # What else the ranks do together comes among the layers' exchanges: a rank that is elsewhere is named.

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Meet at the end of the backward, before DistributedDataParallel waits there: it would not say for what."""
        super().pre_backward(closure_loss)
        if closure_loss.requires_grad:
            end = torch.autograd.Variable._execution_engine.queue_callback
            closure_loss.register_hook(lambda grad: end(lambda: self._meet("end of the backward")))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        self._meet("barrier")
        super().barrier(*args, **kwargs)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over all ranks."""
        if isinstance(tensor, Tensor):
            self._meet("reduction of a logged value")
        return super().reduce(tensor, *args, **kwargs)

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gather a tensor from all ranks."""
        self._meet("all_gather")
        return super().all_gather(tensor, *args, **kwargs)

    def _meet(self, what: str) -> None:
        module = self._lightning_module
        interrupted = module is not None and module._trainer is not None and module.trainer.interrupted
        if self._mesh is not None and self._mesh.phantom.size > 1 and not interrupted:
            self._mesh.phantom.agreement.step(what)
