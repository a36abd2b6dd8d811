"""The command `lightning-phantom compare`: a model trained by each method in turn, on the ranks there are, measured.

There is one way through it. A process that a launcher has started as a rank (RANK and WORLD_SIZE are set, as torchrun
does) trains; any other starts itself as ranks with torchrun and waits. So the same command compares on one machine and,
under torchrun, on several. All methods train in the same processes, one after the other, each in a process group of its
own; dense ones on the first rank alone, while the others wait.
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
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_phantom.commands.compare import options
from lightning_phantom.commands.compare.methods import STYLES, Alone, OneRank, parallelise_with_torch, torch_plan
from lightning_phantom.commands.compare.report import summarise
from lightning_phantom.commands.compare.show import show_result, write_json, write_plot
from lightning_phantom.commands.compare.trial import Length, Measured, run_trial
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import progress
from lightning_phantom.errors import PhantomError
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

    def run(self) -> None:
        """Train by every method, in turn, round after round; show, write and draw what came of it on the first rank."""
        request, first = self.request, self.job.rank == 0
        recipes = {method: request.recipe(method) for method in request.methods}
        methods, left_out = self._able(recipes)
        with progress(len(methods) * request.rounds) if first else nullcontext() as advance:
            for round_number in range(request.rounds):
                for method in methods:
                    if advance is not None:
                        advance(f"{method}, round {round_number + 1} of {request.rounds}")
                    self._one(method, round_number, recipes[method])
                    if first:
                        result = summarise(request, self.environment(), self.runs, left_out)
                        write_json(result, request.json)  # after each run, so that a failure loses one
        if first:
            show_result(result)
            if request.plot:
                write_plot(result, request.plot)
        self.job.gather("end", None)

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

    def _able(self, recipes: dict[str, Recipe]) -> tuple[list[str], dict[str, str]]:
        """The methods that this model can be trained by, and why not by the others."""
        methods, left_out = list(self.request.methods), {}
        if "torch" in methods:
            try:
                torch_plan(recipes["torch"].make_module(), self.job.size)
            except PhantomError as error:
                methods.remove("torch")
                left_out["torch"] = str(error)
        return methods, left_out

    def _one(self, method: str, round_number: int, recipe: Recipe) -> None:
        """One fit by one method; every rank learns what each has measured."""
        key, alone = f"{round_number}/{method}", method in options.ONE_RANK
        measured: Measured | None = None
        if not alone or self.job.rank == 0:
            self._meet(key, recipe, alone)
            try:
                measured = run_trial(recipe, self._length(round_number), *self._settings(method, recipe))
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        seen = self.job.gather(key, None if measured is None else measured.as_dict())
        self.runs.append({"method": method, "round": round_number, "ranks": [one for one in seen if one is not None]})

    def _meet(self, key: str, recipe: Recipe, alone: bool) -> None:
        """A process group of this run's own, for all ranks or the first alone."""
        on_gpu = recipe.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(self.job.rank % self.job.per_host)
        store = PrefixStore(f"group/{key}", self.job.store)
        backend = "nccl" if on_gpu else "gloo"
        size = 1 if alone else self.job.size
        dist.init_process_group(backend, store=store, rank=self.job.rank, world_size=size)

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
        together = {"devices": self.job.per_host, "num_nodes": size // self.job.per_host}
        if method in options.ONE_RANK:
            return {"strategy": OneRank(), "devices": 1, "num_nodes": 1, "plugins": [Alone()]}, None
        if method == "torch":
            strategy: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=size)
            return together | {"strategy": strategy}, parallelise_with_torch
        if method == "phantom":
            request = self.request
            given = recipe.phantom_arguments(num_blocks=request.num_blocks, phantom_width=request.phantom_width)
            strategy = PhantomStrategy(**given | {"phantom_parallel_size": size, "data_parallel_size": 1})
        else:
            strategy = TensorParallelStrategy(tensor_parallel_size=size, data_parallel_size=1, style=STYLES[method])
        return together | {"strategy": strategy}, None
