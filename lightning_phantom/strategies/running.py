"""What the ranks of a run do together: which data they see, what they reduce over, and when they must agree."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_phantom.distributed.comm import gather_copies
from lightning_phantom.distributed.gradients import clip_grad_norm_
from lightning_phantom.distributed.mesh import Mesh
from lightning_phantom.distributed.replicas import ReplicaCheck, realign
from lightning_phantom.distributed.shards import Split
from lightning_phantom.errors import PhantomError
from lightning_phantom.strategies.saving import CheckpointingStrategy


class RunningStrategy(CheckpointingStrategy):
    """A strategy of D replicas, each held by R ranks that see the same batches.

    Args:
        check_replicas: whether to compare what the ranks of one replica must share.
        args: for CheckpointingStrategy, as the following.
        kwargs: for DDPStrategy.
    """

    def __init__(self, check_replicas: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_replicas = check_replicas
        self._check: ReplicaCheck | None = None
        self._mesh: Mesh | None = None
        self._sharded: dict[int, Split] = {}
        self._frozen: list[nn.Parameter] = []

    @property
    def mesh(self) -> Mesh:  # type: ignore[override]
        """This rank's groups, once the processes have found each other."""
        if self._mesh is None:
            raise PhantomError("the ranks have not met yet: groups exist from the Trainer's first run on.")
        return self._mesh

    @property
    def data_parallel_size(self) -> int:
        """D: how many different batches a step sees. `trainer.world_size` counts every rank, R * D."""
        return self.mesh.data_parallel.size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks of one replica read the same samples."""
        return {"num_replicas": self.data_parallel_size, "rank": self.mesh.data_parallel.rank}

    def process_dataloader(self, dataloader: object) -> object:
        """Seed the workers by the replica, so that ranks of one replica augment alike."""
        if (
            isinstance(dataloader, DataLoader)
            and dataloader.worker_init_fn is None
            and int(os.environ.get("PL_SEED_WORKERS", 0))
        ):
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.mesh.data_parallel.rank)
        return super().process_dataloader(dataloader)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        return DistributedDataParallel(
            model,
            device_ids=self.determine_ddp_device_ids(),
            process_group=self.mesh.data_parallel.group,
            **self._ddp_kwargs,
        )

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the replicas by default: the ranks of one replica hold the same value."""
        if not isinstance(tensor, Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group or self.mesh.data_parallel.group, reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather from the replicas by default, which `LightningModule.all_gather` words as the whole world."""
        if group is None or group is dist.group.WORLD:
            group = self.mesh.data_parallel.group
        with nullcontext() if sync_grads else torch.no_grad():
            return gather_copies(tensor, group)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Agree over every rank of the job."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes)
        return int(votes) == self.world_size if all else bool(votes)

    def on_validation_start(self) -> None:
        """Take out what atomics on an accelerator have put between the replicated parameters."""
        self._realign()
        super().on_validation_start()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save as one file or as a directory; every rank calls it."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self._realign()

    def _realign(self) -> None:
        assert self.lightning_module is not None
        if self._check is not None and self.root_device.type != "cpu" and not self.lightning_module.trainer.interrupted:
            realign(self.lightning_module, self._sharded, self.optimizers, self.mesh.phantom)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, after checking that ranks which must agree do."""
        if self._check is not None and self.lightning_module is not None:
            self._check.step(self.lightning_module, self._sharded)
        if any(p.requires_grad for p in self._frozen):
            # A finetuning callback has unfrozen what DistributedDataParallel found frozen and would not average.
            self.model = self.lightning_module
            self.configure_ddp()
        return super().training_step(*self._checked("training", args), **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on batches that agree."""
        return super().validation_step(*self._checked("validation", args), **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on batches that agree."""
        return super().test_step(*self._checked("test", args), **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step on batches that agree."""
        return super().predict_step(*self._checked("prediction", args), **kwargs)

    def _checked(self, kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._check is not None and args:
            self._check.batch(kind, args[0])
        return args

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the whole model; for a `configure_gradient_clipping` of your own.

        Returns:
            The norm before clipping, equal on every rank.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        return clip_grad_norm_(parameters, max_norm, self._sharded, norm_type)

    def _clip_by_norm(self, optimizer: Any, clip_val: float) -> None:
        self.clip_grad_norm_(self.precision_plugin.main_params(optimizer), clip_val)
