"""The strategy that phantom and tensor parallelism share: all but the layers that each of them makes."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_phantom.comm import broadcast, gather_copies
from lightning_phantom.config import is_int
from lightning_phantom.errors import PhantomError, PlanError
from lightning_phantom.ffn import Plan
from lightning_phantom.gradients import agree_on_inf, check_optimizers, clip_grad_norm_
from lightning_phantom.launch import PhantomLauncher
from lightning_phantom.mesh import Mesh, Sizes, make_mesh
from lightning_phantom.prepare import (
    check_trainer,
    check_update_rules,
    count_replicas_once,
    give_back_groups,
    materialise,
)
from lightning_phantom.replicas import ReplicaCheck, realign
from lightning_phantom.saving import CheckpointingStrategy
from lightning_phantom.split import Split, SplitLinear, sharded_parameters, split_layers
from lightning_phantom.swap import carry_out, nothing_qualifies

DEFAULT_TIMEOUT = timedelta(minutes=30)


class SplitStrategy(CheckpointingStrategy):
    """Trains an unchanged LightningModule whose feed-forward linears are split over ranks.

    Each group of R ranks holds one replica of the model: the layers that a plan names split between them, the rest
    whole. With D > 1 replicas, gradients are averaged by DistributedDataParallel. R * D is the number of ranks.

    Args:
        size_name: what a user calls R.
        size: R, or `"auto"`.
        data_parallel_size: D, or `"auto"`.
        state_dict_type: `"full"` or `"sharded"`.
        weights_only: for `torch.load`.
        check_replicas: whether to compare what ranks must share.
        timeout: how long a collective waits.
        checkpoint_io: what reads and writes files.
        kwargs: for DDPStrategy.

    Attributes:
        plan: what happened to each linear; None before the first run.
    """

    strategy_name: str

    def __init__(
        self,
        size_name: str,
        size: int | Literal["auto"],
        data_parallel_size: int | Literal["auto"],
        state_dict_type: str,
        weights_only: bool | None,
        check_replicas: Literal["auto"] | bool,
        timeout: timedelta,
        checkpoint_io: Any,
        **kwargs: Any,
    ) -> None:
        for refused, why in (
            ("start_method", "ranks must be started as processes of their own ('popen' or torchrun)"),
            ("ddp_comm_state", "post-local SGD averages whole models"),
            ("model_averaging_period", "model averaging averages whole models"),
        ):
            if kwargs.pop(refused, None) not in (None, "popen"):
                raise PhantomError(f"{type(self).__name__} does not take {refused}: {why}; leave it out.")
        for name, value in ((size_name, size), ("data_parallel_size", data_parallel_size)):
            if value != "auto" and (not is_int(value) or int(value) < 1):
                raise PhantomError(f"{name}={value!r}: needs an int of at least 1, or 'auto'.")
        if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
            raise PhantomError(f"timeout={timeout!r}: needs a positive datetime.timedelta.")
        if state_dict_type not in ("full", "sharded"):
            raise PhantomError(f"state_dict_type={state_dict_type!r}: choose 'full' or 'sharded'.")
        if check_replicas not in ("auto", True, False):
            raise PhantomError(f"check_replicas={check_replicas!r}: choose 'auto', True or False.")
        super().__init__(state_dict_type, weights_only, checkpoint_io, timeout=timeout, **kwargs)
        self._size = size
        self._data_parallel_size = data_parallel_size
        self._check_replicas = bool(check_replicas)
        self._check: ReplicaCheck | None = None
        self._mesh: Mesh | None = None
        self._seed: int | None = None
        self._sharded: dict[int, Split] = {}
        self._frozen: list[nn.Parameter] = []
        self.plan: Plan | None = None
        self._planned: L.LightningModule | None = None

    # What the two strategies differ in

    def _settle_sizes(self) -> Sizes:
        """R and D for the devices there are."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """What is asked for, with the sizes and the seed settled."""
        raise NotImplementedError

    def _plan(self, module: nn.Module, config: Any) -> Plan:
        """What happens to each linear of a module."""
        raise NotImplementedError

    def _check_layer(self, name: str, layer: SplitLinear, config: Any) -> None:
        """Raise PhantomError if a layer that is split already is none that this strategy would make."""
        raise NotImplementedError

    # Where this rank stands

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

    # Start of a run

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """For `Trainer.init_module`, which always fills weights here: phantom layers start from what is in them."""
        with super().tensor_init_context(False):
            yield

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = PhantomLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Find the other ranks, agree on a seed, and swap the layers that exist: callbacks may copy the model next."""
        super().setup_environment()
        self._mesh = make_mesh(self._settle_sizes(), self._timeout)
        self._agree_on_seed()
        module = self.lightning_module
        assert module is not None
        config = self.config
        if is_overridden("configure_model", module) and config.plan is not None:
            names = [name for name, _ in module.named_modules()]
            present = {g: w for g, w in config.plan.items() if any(fnmatchcase(name, g) for name in names)}
            if not present:
                return
            config = replace(config, plan=present)
        self._swap(config)

    def setup(self, trainer: L.Trainer) -> None:
        """Swap what `configure_model` made, move and align the model, wrap it for D > 1, make the optimizers."""
        assert self.accelerator is not None and self.model is not None and self.lightning_module is not None
        fitting = trainer.state.fn == TrainerFn.FITTING
        self.accelerator.setup(trainer)
        early = split_layers(self.lightning_module)
        self._swap(self.config)
        swapped_late = split_layers(self.lightning_module) != early
        check_trainer(trainer, self.mesh.phantom.size, swapped_late)
        if not split_layers(self.lightning_module):
            raise nothing_qualifies(self.lightning_module, self._plan(self.lightning_module, self.config))
        materialise(self.lightning_module, self.root_device)
        if fitting and self._layer_sync and self.data_parallel_size > 1:
            self.model = self._layer_sync.apply(self.model)
        layers = split_layers(self.lightning_module)
        self.model = self.precision_plugin.convert_module(self.model)
        if split_layers(self.lightning_module) != layers:
            raise PhantomError(
                f"{type(self.precision_plugin).__name__} has put layers of its own where the {self.layer_kind} layers "
                f"were; it replaces linear layers, which {self.layer_kind} layers are not in its sense. Use a plain "
                f"precision."
            )
        self.model_to_device()
        self._align_replicated()
        count_replicas_once(self.lightning_module, self.mesh.data_parallel)
        if fitting:
            if self.data_parallel_size > 1:
                self.configure_ddp()
                # Replicas draw different dropout masks; the ranks within one draw the same numbers.
                torch.manual_seed(torch.initial_seed() + self.mesh.data_parallel.rank)
            self.optimizers, self.lr_scheduler_configs = [], []
            self.setup_optimizers(trainer)
            check_optimizers(self.optimizers, self.lightning_module)
            check_update_rules(self.optimizers, self.mesh.phantom.size)
        self._sharded = sharded_parameters(self.lightning_module)
        self._check = ReplicaCheck(self.mesh.phantom) if self._check_replicas else None
        self.setup_precision_plugin()
        # Instance attributes, removed in teardown: the plugin is the user's and knows nothing of shards.
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            agree_on_inf(scaler, self.mesh.phantom)
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def teardown(self) -> None:
        """Give the precision plugin back as it was, and end the run."""
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None:
            vars(scaler).pop("_unscale_grads_", None)
        module = self._lightning_module
        if module is not None and self._mesh is not None:
            give_back_groups(module, self.mesh.data_parallel)
        if module is not None and any(p.is_meta for p in module.parameters()):
            self._lightning_module = None  # a run that failed early: moving meta tensors would raise over its error
        try:
            super().teardown()
        finally:
            self._lightning_module = module

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        return DistributedDataParallel(
            model,
            device_ids=self.determine_ddp_device_ids(),
            process_group=self.mesh.data_parallel.group,
            **self._ddp_kwargs,
        )

    def _agree_on_seed(self) -> None:
        """Start every rank from one seed when the user set none: replicated dropout must fall alike."""
        if self._seed is None:
            chosen = os.environ.get("PL_GLOBAL_SEED")
            self._seed = seed = self.broadcast(torch.initial_seed() % 2**32 if chosen is None else int(chosen))
            if chosen is None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)

    def _swap(self, config: Any) -> None:
        """Swap what qualifies and is not swapped yet, and show the plan on rank 0."""
        module = self.lightning_module
        assert module is not None
        for name, layer in split_layers(module).items():
            self._check_layer(name, layer, config)
        if module is not self._planned:
            self._planned, self.plan = module, None
        linears = {name for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        if self.plan is not None and self.plan.config == config:
            if linears == {layer.name for layer in self.plan.layers}:
                return
        plan = self._plan(module, config)
        if not plan.swapped:
            self.plan = self.plan or plan
            return
        digests: list[str | None] = [None] * self.world_size
        dist.all_gather_object(digests, str(plan))
        if len(set(digests)) > 1:
            raise PlanError("the ranks built different modules, so their plans differ; build the same one on each.")
        _show(plan)
        carry_out(module, plan, self.mesh.phantom.process_group, dist.group.WORLD)
        _show_shares(plan, module, self.mesh.phantom.size)
        self.plan = plan if self.plan is None else _joined(self.plan, plan)

    @torch.no_grad()
    def _align_replicated(self) -> None:
        """Give every rank global rank 0's replicated parameters and buffers; shards are each rank's own."""
        assert self.lightning_module is not None
        sharded = sharded_parameters(self.lightning_module)
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            if id(tensor) not in sharded:
                tensor.copy_(broadcast(tensor, dist.group.WORLD))

    # Across ranks, during a run

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
            realign(self.lightning_module, self.optimizers, self.mesh.phantom)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, after checking that ranks which must agree do."""
        if self._check is not None and self.lightning_module is not None:
            self._check.step(self.lightning_module)
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

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the strategy known by name."""
        if cls.strategy_name not in strategy_registry:
            strategy_registry.register(cls.strategy_name, cls, description=(cls.__doc__ or "").splitlines()[0])


def _joined(first: Plan, second: Plan) -> Plan:
    """One plan for layers swapped in two passes."""
    later = {layer.name: layer for layer in second.layers}
    kept = {layer.name: layer for layer in first.swapped}
    return replace(
        second,
        layers=tuple(kept.get(name, layer) for name, layer in later.items()),
        chains=first.chains + second.chains,
    )


@rank_zero_only
def _show(plan: Plan) -> None:
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(plan)
    else:
        print(plan, flush=True)
    for layer in plan.swapped:
        if "warning: " in layer.reason:
            rank_zero_warn(f"{layer.name!r}: {layer.reason.partition('warning: ')[2]}.")


@rank_zero_only
def _show_shares(plan: Plan, module: nn.Module, ranks: int) -> None:
    if ranks > 1:
        whole = sum(layer.weights_after for layer in plan.swapped)
        held = sum(p.numel() for layer in plan.swapped for p in module.get_submodule(layer.name).parameters())
        print(
            f"Each of {ranks} ranks holds {held:,} of the {whole:,} weights of the swapped layers; "
            f"Lightning's model summary counts one rank's.",
            flush=True,
        )
