"""What each method takes to the dense model's loss: steps, seconds, FLOPs and bytes, on 2 and 4 ranks, over seeds.

    python -m benchmarks.to_loss window
    python -m benchmarks.to_loss window-512              # four times the windows a step, half the steps
    python -m benchmarks.to_loss transformer --seeds 0 1 2
    python -m benchmarks.to_loss window --table-only

Two kinds of run, both of the command line that users have, kept in `--folder` and not run again if they are there:

1. Losses: `lightning-phantom fit` on one process, which is what any number of ranks compute at this global batch (no
   dropout; the tests hold it), so it need not be timed and other work may run beside. With the first seed every model
   is trained at learning rates a factor of 1.41 apart until the best has a worse one on either side; then at that one
   with every seed.
2. Steps: `lightning-phantom compare` on 2 and on 4 ranks, all methods in turn. Nothing else may run meanwhile.

Seconds to a loss are steps to it times the median step; that of a model with a comparison of its own beside DDP is
brought to the other's by DDP's. The methods that train the dense model (ddp, fsdp and tensor
parallelism) share its losses: they compute the same.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_phantom.cost.methods import EXACT


@dataclass(frozen=True)
class Model:
    """A model to train.

    Attributes:
        name: in the table.
        fit: arguments of `fit`, and of `compare` where the model is phantom.
        lr: where the search for the best learning rate begins.
        method: of `compare`, whose step it takes.
        beside: whether its step needs a comparison of its own.
    """

    name: str
    fit: tuple[str, ...]
    lr: float
    method: str
    beside: bool = False


@dataclass(frozen=True)
class Task:
    """An example, and what is trained on it.

    Attributes:
        config: of the example.
        common: arguments of every run.
        batch: samples a step, all ranks together.
        steps: of a fit.
        every: steps between validations.
        models: the dense one first.
    """

    config: str
    common: tuple[str, ...]
    batch: int
    steps: int
    every: int
    models: tuple[Model, ...]


def phantom(**settings: object) -> tuple[str, ...]:
    """The arguments that ask for the strategy."""
    start = "--trainer.strategy"
    return f"{start}=lightning_phantom.PhantomStrategy", *(f"{start}.{key}={v}" for key, v in settings.items())


DENSE = "--trainer.strategy=auto"
# The smaller models' widths are those that `compare` finds: as many weights as the phantom model has.
TASKS = {
    "window": Task(
        "examples/window.yaml",
        (),
        128,
        2000,
        200,
        (
            Model("dense", (DENSE,), 2e-3, "ddp"),
            Model("smaller dense", (DENSE, "--model.width=416"), 2.8e-3, "smaller"),
            Model("smaller dense, skips", (DENSE, "--model.width=416", "--model.skips=true"), 2.8e-3, "smaller"),
            Model("phantom", phantom(num_blocks=8, phantom_width=32, init="random"), 2.8e-3, "phantom"),
            Model(
                "phantom, both latents",
                phantom(num_blocks=8, phantom_width=20, init="random", latents="both"),
                2e-3,
                "phantom",
                beside=True,
            ),
        ),
    ),
    "transformer": Task(
        "examples/lm.yaml",
        ("--model.dropout=0",),
        8,
        600,
        60,
        (
            Model("dense", (DENSE,), 3e-3, "ddp"),
            Model("smaller dense", (DENSE, "--model.width=144"), 3e-3, "smaller"),
            Model("phantom", phantom(num_blocks=8, phantom_width=0.25), 3e-3, "phantom"),
        ),
    ),
}

# With larger batches the best learning rates are higher.
TASKS["window-512"] = replace(
    TASKS["window"],
    batch=512,
    steps=1000,
    every=100,
    models=tuple(replace(model, lr=4e-3) for model in TASKS["window"].models),
)


class Runs:
    """The runs of a task, each made when it is first asked for."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args, self.folder = task, args, args.folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def losses(self, model: Model, lr: float, seed: int) -> list[tuple[int, float]]:
        """`(steps, validation loss)` of a fit."""
        folder = self.folder / f"{model.name.replace(', ', '_').replace(' ', '_')}-{lr:.2e}-{seed}"
        found = _losses(folder)
        if found and found[-1][0] >= self.task.steps:
            return found
        if self.args.table_only:
            raise SystemExit(f"{folder} holds no finished fit: run without --table-only.")
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lightning_phantom", "fit", f"--config={self.task.config}"]
        command += [f"--seed_everything={seed}", f"--data.batch_size={self.task.batch}", f"--model.lr={lr}"]
        command += [f"--trainer.max_steps={self.task.steps}", f"--trainer.val_check_interval={self.task.every}"]
        command += ["--trainer.devices=1", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
        command += [f"--trainer.logger.init_args.save_dir={folder}", *self.task.common]
        command += model.fit
        with (folder / "output.txt").open("w") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}\nended with {run.returncode}; see {folder / 'output.txt'}")
        return _losses(folder)

    def best(self, model: Model) -> tuple[float, dict[float, float]]:
        """The learning rate with the lowest loss at the end, and all that were tried, with the first seed."""
        tried: dict[int, float] = {}
        best, wanted = 0, [0]
        while wanted:
            for power in wanted:
                tried[power] = self.losses(model, model.lr * 2 ** (power / 2), self.args.seeds[0])[-1][1]
                print(f"{model.name}, lr {model.lr * 2 ** (power / 2):.1e}: {tried[power]:.4f}", flush=True)
            best = min(tried, key=tried.__getitem__)
            wanted = [power for power in (best - 1, best + 1) if power not in tried]
        return model.lr * 2 ** (best / 2), {model.lr * 2 ** (p / 2): tried[p] for p in sorted(tried)}

    def compared(self, ranks: int, model: Model) -> dict[str, Any]:
        """The record of a comparison on so many ranks: all methods, or DDP and a model of its own."""
        own = model.name.replace(", ", "_").replace(" ", "_") if model.beside else "all"
        file = self.folder / f"compare-{ranks}-{own}.json"
        if not file.exists():
            if self.args.table_only:
                raise SystemExit(f"{file} is not there: run without --table-only.")
            print(f"comparing on {ranks} ranks: {own}", flush=True)
            phantom = next(m for m in self.task.models if m.name == "phantom")
            command = [sys.executable, "-m", "lightning_phantom", "compare", f"--config={self.task.config}"]
            command += [f"--ranks={ranks}", f"--rounds={self.args.rounds}", f"--json={file}", *self.task.common]
            command += [f"--data.batch_size={self.task.batch // ranks}"]
            command += ["--methods=ddp,phantom", *model.fit] if model.beside else phantom.fit
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        record: dict[str, Any] = json.loads(file.read_text())
        if model.beside:  # the machine was faster or slower then, as DDP says, which ran in both
            others = self.compared(ranks, self.task.models[0])["methods"]["ddp"]["step_s"]["median"]
            mine = record["methods"]["ddp"]["step_s"]["median"]
            record["methods"][model.method]["step_s"]["median"] *= others / mine
        return record


def _losses(folder: Path) -> list[tuple[int, float]]:
    """`(steps, validation loss)` of the newest fit in a folder."""
    files = sorted(folder.glob("**/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    with files[-1].open() as lines:
        return [(int(row["step"]) + 1, float(row["val_loss"])) for row in csv.DictReader(lines) if row["val_loss"]]


def steps_to(losses: list[tuple[int, float]], target: float) -> float | None:
    """Steps until a loss is reached, between two validations along a line; None if it is not."""
    before: tuple[int, float] | None = None
    for step, loss in losses:
        if loss <= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


@dataclass(frozen=True)
class Row:
    """A model's losses by one method, and what they took: each list has a value per seed, None where not reached."""

    name: str
    lr: float
    last: list[float]
    steps: list[float | None]
    cost: dict[int, dict[str, Any]]  # by number of ranks: a method's record of `compare`


def rows_of(runs: Runs) -> tuple[list[Row], float, dict[str, list[list[tuple[int, float]]]]]:
    """The rows of the table, the loss to reach, and every model's losses by seed."""
    task, args = runs.task, runs.args
    rates = {model.name: runs.best(model)[0] for model in task.models}
    fits = [(model, seed) for seed in args.seeds for model in task.models]
    losses: dict[str, list[list[tuple[int, float]]]] = {model.name: [] for model in task.models}
    for model, seed in tqdm(fits, desc="seeds"):
        losses[model.name].append(runs.losses(model, rates[model.name], seed))
    target = max(seen[-1][1] for seen in losses[task.models[0].name])
    rows = []
    for model in task.models:
        methods = EXACT if model.method == "ddp" else (model.method,)
        records = {ranks: runs.compared(ranks, model) for ranks in args.ranks}
        for method in methods:
            cost = {
                ranks: record["methods"][method] for ranks, record in records.items() if method in record["methods"]
            }
            if not cost:
                continue
            seen = losses[model.name]
            steps = [steps_to(fit, target) for fit in seen]
            name = model.name if len(methods) == 1 else f"{model.name}, {method}"
            rows.append(Row(name, rates[model.name], [fit[-1][1] for fit in seen], steps, cost))
    return rows, target, losses


def table(rows: list[Row], target: float, args: argparse.Namespace, last: int) -> str:
    """Markdown: a line per model and method."""
    head = ["", "learning rate", f"loss after {last} steps", f"steps to {target:.4f}"]
    for ranks in args.ranks:
        head += [f"{ranks} ranks: ms a step", "seconds", "TFLOPs", "GB sent"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row.name, f"{row.lr:.1e}", spread(row.last, "{:.4f}"), spread(row.steps, "{:.0f}")]
        for ranks in args.ranks:
            cost = row.cost.get(ranks)
            if cost is None:
                line += ["-"] * 4
                continue
            step = cost["step_s"]["median"]
            line += [f"{step * 1000:.1f}"]
            for a_step, form in (
                (step, "{:.0f}"),
                (cost["flops"] / 1e12, "{:.2f}"),
                (cost["sent_bytes"] / 1e9, "{:.2f}"),
            ):
                line += [spread([None if s is None else s * a_step for s in row.steps], form)]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float | None], form: str) -> str:
    """The mean and the extremes, or in how many runs there is no value."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"never in {len(values) - len(there)} of {len(values)}"
    mean, low, high = (form.format(f(there)) for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(rows: list[Row], losses: dict[str, list[list[tuple[int, float]]]], ranks: int, file: Path) -> None:
    """Loss against a rank's seconds, and against the bytes that it sends; of dense the fastest method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    shown: dict[str, Row] = {}
    for row in rows:
        model = next(name for name in sorted(losses, key=len, reverse=True) if row.name.startswith(name))
        if ranks in row.cost:
            best = shown.get(model)
            if best is None or row.cost[ranks]["step_s"]["median"] < best.cost[ranks]["step_s"]["median"]:
                shown[model] = row
    for model, row in shown.items():
        means = [(fits[0][0], statistics.fmean(loss for _, loss in fits)) for fits in zip(*losses[model], strict=True)]
        cost = row.cost[ranks]
        for axis, a_step in zip(axes, (cost["step_s"]["median"], cost["sent_bytes"] / 1e9), strict=True):
            axis.plot([s * a_step for s, _ in means], [loss for _, loss in means], label=row.name)
    axes[0].set(xlabel=f"seconds of training, {ranks} ranks", ylabel="validation loss, nats")
    axes[1].set(xlabel="GB that a rank has sent", xscale="log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--losses-of", nargs="+", help="run the fits of these models alone, and time nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison")
    parser.add_argument("--folder", type=Path, help="default: outputs/to_loss/TASK")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="draw the losses there")
    args = parser.parse_args()
    args.folder = args.folder or Path("outputs/to_loss") / args.task
    task = TASKS[args.task]
    if args.losses_of:
        runs = Runs(task, args)
        for model in (m for m in task.models if m.name in args.losses_of):
            rate = runs.best(model)[0]
            for seed in args.seeds:
                print(
                    f"{model.name}, lr {rate:.1e}, seed {seed}: {runs.losses(model, rate, seed)[-1][1]:.4f}", flush=True
                )
        return
    rows, target, losses = rows_of(Runs(task, args))
    print(f"\n{len(args.seeds)} seeds, mean (least to most); per rank\n\n{table(rows, target, args, task.steps)}")
    if args.plot:
        draw(rows, losses, max(args.ranks), args.plot)


if __name__ == "__main__":
    main()
