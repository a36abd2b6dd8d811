"""How well `lightning-phantom plan` predicts the step that `lightning-phantom compare` measures, method by method.

    python -m benchmarks.predict                      # three minutes or more on two cores
    python -m benchmarks.predict --out predict.json

Eight configurations, feed-forward networks (benchmarks/ffn.py) and transformers (examples/lm.py), on 2 and on 4 ranks.
The rates of the machine are measured on those ranks first, on layers of other sizes (`measure.machine`); then every
method trains in turn, round after round. The optimizer is SGD, which takes little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch.distributed import PrefixStore, TCPStore

from examples.lm import LanguageModel
from lightning_phantom.commands.compare import options
from lightning_phantom.commands.compare.command import Comparison, Job
from lightning_phantom.commands.plan import by_other_methods, divided
from lightning_phantom.commands.terminal import LABELS
from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.methods import METHODS
from lightning_phantom.cost.predict import Machine
from lightning_phantom.cost.scale import Setting
from lightning_phantom.measure.machine import measure
from lightning_phantom.plan.finder import plan_phantom


class Transformer(LanguageModel):
    """The language model without dropout, trained by SGD."""

    def __init__(self, dim: int, depth: int, heads: int, context: int, width: int | None = None) -> None:
        super().__init__(dim, depth, heads, context, width, dropout=0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on every parameter."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Case(NamedTuple):
    """A configuration: sizes of the model, and rows of the activations that a rank reads."""

    ranks: int
    kind: str  # "ffn" or "transformer"
    features: int
    depth: int
    num_blocks: int
    phantom_width: int | float
    batch: int
    context: int = 1

    @property
    def tokens(self) -> int:
        """Of all ranks together."""
        return self.ranks * self.batch * self.context

    def config(self) -> dict[str, Any]:
        """As `compare` reads it."""
        n = self.features
        if self.kind == "ffn":
            model = {"class_path": "benchmarks.ffn.FeedForward", "init_args": {"width": n, "depth": self.depth}}
            data = {"class_path": "benchmarks.ffn.RandomVectors", "init_args": {"width": n, "samples": self.batch}}
            data["init_args"]["batches"] = 2 * self.ranks
        else:
            sizes = {"dim": n, "depth": self.depth, "heads": n // 64, "context": self.context}
            model = {"class_path": "benchmarks.predict.Transformer", "init_args": sizes}
            read = {"context": self.context, "batch_size": self.batch, "max_bytes": 400_000}
            data = {"class_path": "examples.lm.Text", "init_args": read}
        strategy = {"class_path": "lightning_phantom.PhantomStrategy"}
        strategy["init_args"] = {"phantom_width": self.phantom_width, "init": "random"}
        trainer = {"accelerator": "cpu", "strategy": strategy, "limit_val_batches": 0}
        return {"trainer": trainer, "model": model, "data": data}


CASES = (
    Case(2, "ffn", 1024, 4, 4, 32, 256),
    Case(2, "ffn", 1792, 3, 8, 24, 192),
    Case(2, "ffn", 2048, 2, 2, 64, 128),
    Case(2, "transformer", 512, 2, 8, 0.25, 4, 128),
    Case(2, "transformer", 768, 1, 4, 0.25, 8, 64),
    Case(4, "ffn", 1024, 4, 4, 32, 128),
    Case(4, "ffn", 1280, 3, 8, 16, 96),
    Case(4, "transformer", 512, 1, 8, 0.25, 4, 128),
)
SMALL = (Case(2, "transformer", 64, 1, 4, 0.25, 2, 16),)


def measured_and_predicted(case: Case, job: Job, machine: Machine, folder: Path, lengths: list[str]) -> dict[str, Any]:
    """By method, the seconds of a step that were measured and predicted; and what could not be had."""
    path = folder / f"{job.rank}.yaml"
    path.write_text(yaml.safe_dump(case.config()))
    request = options.parse(["--config", str(path), "--num-blocks", str(case.num_blocks), *lengths])
    comparison = Comparison(request, job)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = comparison.run()
    if result is None:
        return {}
    recipe, config = request.recipe("phantom"), PhantomConfig(case.num_blocks, case.phantom_width)
    plan = plan_phantom(module := recipe.make_module(), config)
    model, others = divided(module, plan), by_other_methods(recipe, module, config, case.ranks)
    setting = Setting(model.layers, case.phantom_width, case.tokens, "float32", machine, model.rest, **others)
    here = setting.scale(case.num_blocks, case.ranks)
    both = [method for method in METHODS if method in result["methods"] and method in here.times]
    return {
        "case": case._asdict(),
        "methods": {m: {"measured": result["methods"][m], "predicted": asdict(here.times[m])} for m in both},
        "left_out": {**setting.left_out, **result["left_out"]},
    }


def rank_main(rank: int, size: int, port: int, cases: list[Case], lengths: list[str], folder: str) -> None:
    """Measure the machine, then go through the configurations for so many ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), NODE_RANK="0")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    store = TCPStore("127.0.0.1", port, timeout=timedelta(minutes=5))
    dist.init_process_group("gloo", store=PrefixStore("rates", store), rank=rank, world_size=size)
    say(rank, f"{size} ranks: measuring the machine")
    machine = measure(dist.group.WORLD)
    dist.destroy_process_group()
    rows = []
    for number, case in enumerate(cases):
        say(rank, f"{size} ranks: {number + 1} of {len(cases)}, {name_of(case._asdict())}")
        job = Job(rank, size, size, PrefixStore(f"case {number}", store))
        rows.append(measured_and_predicted(case, job, machine, Path(folder), lengths))
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps({"machine": asdict(machine), "cases": rows}))


def say(rank: int, words: str) -> None:
    if rank == 0:
        print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def name_of(case: dict[str, Any]) -> str:
    tokens = case["ranks"] * case["batch"] * case["context"]
    return (
        f"{case['kind']} n={case['features']} depth={case['depth']} p={case['num_blocks']} k={case['phantom_width']} "
        f"{tokens} tokens"
    )


def show(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print every configuration, predicted beside measured; return the median error by method, and overall."""
    errors: dict[str, list[float]] = {}
    head = f"{'':18} {'measured':>9} {'predicted':>9} {'error':>7}   of the fastest: {'measured':>9} {'predicted':>9}"
    for row in rows:
        seen = {m: one["measured"]["step_s"]["median"] for m, one in row["methods"].items()}
        times = {m: one["predicted"]["compute_s"] + one["predicted"]["waited_s"] for m, one in row["methods"].items()}
        fastest = min((m for m in seen if m not in ("phantom", "smaller")), key=lambda m: seen[m])
        print(f"\n{row['case']['ranks']} ranks, {name_of(row['case'])}\n{head}")
        for m in seen:
            error = times[m] / seen[m] - 1
            errors.setdefault(m, []).append(abs(error))
            print(
                f"{LABELS[m]:20} {1e3 * seen[m]:6.1f} ms {1e3 * times[m]:6.1f} ms {error:+7.1%} "
                f"{seen[m] / seen[fastest]:26.3f} {times[m] / times[fastest]:9.3f}"
            )
        for method, why in row["left_out"].items():
            print(f"left out: {method}: {why}")
    medians = {m: statistics.median(errors[m]) for m in METHODS if m in errors}
    medians["all"] = statistics.median(e for of_one in errors.values() for e in of_one)
    print("\nmedian error: " + ", ".join(f"{LABELS.get(m, m)} {error:.1%}" for m, error in medians.items()))
    return medians


def main() -> None:
    """Measure on 2, then on 4 ranks."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__, formatter_class=kind)
    parser.add_argument("--rounds", type=int, default=2, help="fits of each method (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a fit (default: 5)")
    parser.add_argument("--small", action="store_true", help="one tiny configuration, to see that it runs")
    parser.add_argument("--out", type=Path, help="write all numbers there")
    args = parser.parse_args()
    lengths = ["--rounds", str(args.rounds), "--steps", str(args.steps), "--warmup", "2"]
    cases, machines, rows = SMALL if args.small else CASES, {}, []
    for size in sorted({case.ranks for case in cases}):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            ours = [case for case in cases if case.ranks == size]
            mp.spawn(rank_main, (size, store.port, ours, lengths, folder), nprocs=size)
            found = json.loads((Path(folder) / "rows.json").read_text())
        machines[size] = found["machine"]
        rows += found["cases"]
        print(f"{size} ranks: {Machine(**found['machine'])}")
    medians = show(rows)
    if args.out is not None:
        args.out.write_text(json.dumps({"machines": machines, "cases": rows, "median_errors": medians}, indent=2))


if __name__ == "__main__":
    main()
