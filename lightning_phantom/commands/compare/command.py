"""The command `lightning-phantom compare`: a model trained by each method in turn, on the ranks there are, measured.

There is one way through it. A process that a launcher has started as a rank (RANK and WORLD_SIZE are set, as torchrun
does) trains; any other starts itself as ranks with torchrun and waits. So the same command compares on one machine and,
under torchrun, on several. All methods train in the same processes, one after the other, each in a process group of its
own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_phantom.commands.compare import options
from lightning_phantom.commands.compare.methods import (
    STYLES,
    FullySharded,
    SharedBatches,
    cannot_divide,
    parallelise_with_torch,
    shard_fully,
)
from lightning_phantom.commands.compare.report import summarise
from lightning_phantom.commands.compare.show import show_result, write_json, write_plot
from lightning_phantom.commands.compare.smaller import smaller_argument
from lightning_phantom.commands.compare.trial import Length, run_trial
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import progress
from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import TENSOR_PARALLEL
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl
from lightning_phantom.strategies.phantom import PhantomStrategy
from lightning_phantom.strategies.tensor_parallel import TensorParallelStrategy

LONGEST_RUN = timedelta(days=2)


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments: as a rank, or as the one that starts the ranks."""
    request = options.parse(args)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        Comparison(request, Job.from_environment()).run()
        return
    for method in request.methods:
        request.recipe(method)  # what is wrong with a config is said once, not by every rank
    threads = str(max(1, (os.cpu_count() or 1) // request.ranks))
    started = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.ranks}"),
            *("-m", "lightning_phantom", "compare", *args),
        ],
        env={"OMP_NUM_THREADS": threads} | os.environ,
    )
    if started.returncode:
        raise SystemExit(started.returncode)


@dataclass(frozen=True)
class Job:
    """This process among those that the launcher has started, which speak through its store."""

    rank: int
    size: int
    per_host: int
    store: Store

    @classmethod
    def from_environment(cls) -> Job:
        """As torchrun has set it up."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, size, is_master=rank == 0 and not agent, timeout=timedelta(minutes=5))
        return cls(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), PrefixStore("compare", store))

    def gather(self, key: str, value: Any) -> list[Any]:
        """Give what every rank holds to all of them, by rank; waits for the slowest."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, LONGEST_RUN)
        return [json.loads(self.store.get(k)) for k in keys]


class Comparison:
    """The runs of a comparison, as one rank sees them.

    Args:
        request: what is to be compared.
        job: this process and the others.
    """

    def __init__(self, request: options.Request, job: Job) -> None:
        self.request, self.job = request, job
        self.runs: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}

    def run(self) -> dict[str, Any] | None:
        """Train by every method, in turn, round after round; show, write and draw what came of it on the first rank.

        Returns:
            The result (see `summarise`) on the first rank, None on the others.
        """
        request, first, result = self.request, self.job.rank == 0, None
        recipes = {method: request.recipe(method) for method in request.methods}
        methods = self._able(recipes)
        with progress(len(methods) * request.rounds) if first else nullcontext() as advance:
            for round_number in range(request.rounds):
                for method in (m for m in methods if m not in self.left_out):
                    if advance is not None:
                        advance(f"{method}, round {round_number + 1} of {request.rounds}")
                    self._one(method, round_number, recipes[method])
                    if first:
                        result = summarise(request, self.environment(), self.runs, self.left_out)
                        write_json(result, request.json)  # after each run, so that a failure loses one
        if result is not None:
            show_result(result)
            if request.plot:
                write_plot(result, request.plot)
        self.job.gather("end", None)
        return result

    def environment(self) -> dict[str, Any]:
        """Where it runs."""
        return {
            "ranks": self.job.size,
            "hosts": self.job.size // self.job.per_host,
            "threads_per_rank": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "torch": torch.__version__,
        }

    def _able(self, recipes: dict[str, Recipe]) -> list[str]:
        """The methods that this model can be trained by; why not by the others is noted."""
        methods = list(self.request.methods)
        tries = {**dict.fromkeys(TENSOR_PARALLEL, self._divide), "smaller": self._make_smaller}
        for method, prepare in tries.items():
            if method in methods:
                try:
                    prepare(recipes, method)
                except PhantomError as error:
                    methods.remove(method)
                    self.left_out[method] = str(error)
        return methods

    def _divide(self, recipes: dict[str, Recipe], method: str) -> None:
        why = cannot_divide(recipes[method].make_module(), self.job.size).get(method)
        if why:
            raise PhantomError(why)

    def _make_smaller(self, recipes: dict[str, Recipe], method: str) -> None:
        if not self.request.smaller:
            recipe = self.request.recipe("phantom")
            given = self._phantom_arguments(recipe)
            names = ("num_blocks", "phantom_width", "plan", "mixing", "latents")
            config = PhantomConfig(**{"num_blocks": self.job.size} | {n: given[n] for n in names if n in given})
            name, width = smaller_argument(self.request.recipe("smaller"), config)
            recipes[method] = self.request.recipe(method, f"model.{name}={width}")

    def _phantom_arguments(self, recipe: Recipe) -> dict[str, Any]:
        request = self.request
        return recipe.phantom_arguments(num_blocks=request.num_blocks, phantom_width=request.phantom_width)

    def _one(self, method: str, round_number: int, recipe: Recipe) -> None:
        """One fit by one method; every rank learns what each has measured."""
        key = f"{round_number}/{method}"
        self._meet(key, recipe)
        try:
            measured = run_trial(recipe, self._length(round_number), *self._settings(method, recipe))
        except Exception as error:
            if method not in options.OTHERS:
                raise
            # By its model or data, which are alike on all ranks.
            self.left_out[method] = str(error) if isinstance(error, PhantomError) else f"it failed: {error!r}"
            return
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        self.runs.append({"method": method, "round": round_number, "ranks": self.job.gather(key, measured.as_dict())})

    def _meet(self, key: str, recipe: Recipe) -> None:
        """A process group of this run's own."""
        on_gpu = recipe.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(self.job.rank % self.job.per_host)
        store = PrefixStore(f"group/{key}", self.job.store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=self.job.rank, world_size=self.job.size)

    def _length(self, round_number: int) -> Length:
        """The first round also trains to the losses; the others only take times."""
        request = self.request
        timed = request.warmup + request.steps
        if round_number:
            return Length(timed, request.warmup)
        steps = request.train_steps or timed
        every = request.validate_every or steps
        return Length(steps, request.warmup, every, request.monitor, request.target_loss is not None)

    def _settings(self, method: str, recipe: Recipe) -> tuple[dict[str, Any], Any]:
        """The Trainer's arguments for a method, and what to do with the module first."""
        size = self.job.size
        ranks = {"devices": self.job.per_host, "num_nodes": size // self.job.per_host}
        given = self._phantom_arguments(recipe)
        shared = given.get("phantom_parallel_size", "auto")
        shared = given["phantom_parallel_size"] = size if shared == "auto" else shared  # by all ranks, of all hosts
        averaging = {name: given[name] for name in ("find_unused_parameters",) if name in given}
        prepare: Any = None
        if method in ("ddp", "smaller"):
            strategy: Any = pl.strategies.DDPStrategy(**averaging)
        elif method == "fsdp":
            strategy = FullySharded(data_parallel_size=size, tensor_parallel_size=1)
            prepare = shard_fully
        elif method == "tensor_parallel_torch":
            strategy = SharedBatches(data_parallel_size=1, tensor_parallel_size=size)
            prepare = parallelise_with_torch
        elif method == "phantom":
            strategy = PhantomStrategy(**given)
        else:
            strategy = TensorParallelStrategy(shared, style=STYLES[method], **averaging)
        return ranks | {"strategy": strategy}, prepare
