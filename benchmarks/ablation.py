"""What phantom width and number of blocks do to the loss: the language model of examples/lm.py on one process.

    python -m benchmarks.ablation                     # writes outputs/ablation.csv and outputs/ablation.svg
    python -m benchmarks.ablation --steps 200 --seeds 0 --blocks 2 4 --widths 0.25   # a first look
    python -m benchmarks.ablation --plot-only         # draws the CSV again

The model (p, k) does not depend on the number of ranks, so one process is enough. Each phantom model is compared with
the dense model and with a control: a dense model whose feed-forward networks are so narrow that it has as many
parameters, as nearly as possible. With the first seed every model runs at each learning rate; with the others at the
one that was best. One row is written per run: what the CSV holds already is not run again, so a run that was stopped
goes on where it was. Loss is the mean over the held-out text in nats per byte, after the last step.
"""

import argparse
import csv
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from tqdm import tqdm

from examples.lm import LanguageModel, Text
from lightning_phantom import PhantomConfig, phantomize_, plan_phantom

COLUMNS = ("method", "p", "k", "lr", "seed", "weights", "val_loss", "steps", "seconds")


class Model(NamedTuple):
    """One model of the comparison: "dense", "phantom" (p, k), or the "narrow" dense one of as many parameters."""

    method: str
    p: int | None
    k: int | None
    width: int
    weights: int


class Sizes(NamedTuple):
    """What all models share."""

    dim: int
    depth: int
    context: int
    batch_size: int

    def module(self, model: Model, lr: float = 1e-3) -> LanguageModel:
        """Build a model, as it is before any layer is swapped."""
        heads = max(1, self.dim // 32)
        return LanguageModel(self.dim, self.depth, heads, self.context, model.width, lr=lr)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sizes = Sizes(args.dim, args.depth, args.context, args.batch_size)
    if not args.plot_only:
        run_all(args, sizes)
    results = summarise(read(args.csv))
    print(as_table(results))
    picture = args.csv.with_suffix(".svg")
    draw(results, picture)
    print(f"\nRuns: {args.csv}. Picture: {picture}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__, formatter_class=kind)
    parser.add_argument("--csv", type=Path, default=Path("outputs/ablation.csv"), help="one row per run (%(default)s)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8], help="p: numbers of blocks (2 4 8)")
    parser.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[0.125, 0.25, 0.5],
        help="k: phantom widths as fractions of the block width dim/p (0.125 0.25 0.5)",
    )
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 6e-3, 12e-3], help="peak learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="initialisation and batches (0 1 2)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="features of the stream (%(default)s)")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks (%(default)s)")
    parser.add_argument("--context", type=int, default=64, help="bytes of a window (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows of a batch (%(default)s)")
    parser.add_argument("--text", help="a file to read; default: this Python's standard library")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    parser.add_argument("--plot-only", action="store_true", help="run nothing, draw what the CSV holds")
    return parser.parse_args(arguments)


def run_all(args: argparse.Namespace, sizes: Sizes) -> None:
    """Run what the CSV does not hold yet, seed by seed, so that it can be stopped at any time."""
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    models = list(models_of(sizes, args.blocks, args.widths))
    data = Text(args.text, args.context, args.batch_size)
    done = {key(row): row for row in read(args.csv)}
    first, *others = args.seeds
    with tqdm(total=len(models) * (len(args.lrs) + len(others)), desc="runs") as progress:

        def result(model: Model, lr: float, seed: int) -> float:
            method, p, k, _, weights = model
            row = dict(method=method, p=p, k=k, lr=lr, seed=seed, weights=weights, steps=args.steps)
            known = done.get(key(row))
            if known is None:
                progress.set_postfix(method=model.method, p=model.p, k=model.k, lr=lr, seed=seed)
                known = {**row, **train(sizes, model, lr, seed, args.steps, data)}
                done[key(known)] = known
                append(args.csv, known)
            progress.update()
            return known["val_loss"]

        best = {model: min(args.lrs, key=lambda lr, model=model: result(model, lr, first)) for model in models}
        for seed in others:
            for model in models:
                result(model, best[model], seed)


def models_of(sizes: Sizes, blocks: list[int], widths: list[float]) -> Iterator[Model]:
    """The dense model, and each phantom model with its control."""
    dense = Model("dense", None, None, 4 * sizes.dim, 0)
    dense = dense._replace(weights=count(sizes.module(dense)))
    yield dense
    seen = set()
    for p in blocks:
        for width in widths:
            module = sizes.module(dense)
            config = PhantomConfig(p, width)
            k = plan_phantom(module, config).swapped[0].phantom_width
            if (p, k) in seen:
                continue
            seen.add((p, k))
            weights = count(phantomize_(module, config))
            yield Model("phantom", p, k, dense.width, weights)
            # A feature less takes a row and a column, and a bias, out of each block's network.
            fewer = round((dense.weights - weights) / (sizes.depth * (2 * sizes.dim + 1)))
            narrow = Model("narrow", p, k, dense.width - fewer, 0)
            yield narrow._replace(weights=count(sizes.module(narrow)))


def train(sizes: Sizes, model: Model, lr: float, seed: int, steps: int, data: Text) -> dict[str, float]:
    """Train one model from scratch; return its loss and the CPU seconds it took."""
    start = time.process_time()
    L.seed_everything(seed, verbose=False)
    module = sizes.module(model, lr)
    if model.method == "phantom":
        phantomize_(module, PhantomConfig(model.p, model.k))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=1.0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return {
        "val_loss": round(trainer.callback_metrics["val_loss"].item(), 5),
        "seconds": round(time.process_time() - start, 1),
    }


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def key(row: dict) -> tuple:
    return tuple(row[name] for name in COLUMNS if name not in ("val_loss", "seconds"))


def read(path: Path) -> list[dict]:
    """The runs of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {name: text if name == "method" else number(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def number(text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


def append(path: Path, row: dict) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


class Result(NamedTuple):
    """A model at its best learning rate: mean and standard deviation over the seeds."""

    method: str
    p: int | None
    k: int | None
    weights: int
    lr: float
    mean: float
    deviation: float
    seeds: int


def summarise(rows: list[dict]) -> list[Result]:
    """One result per model, at the learning rate that was best with the first seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["p"], row["k"], row["weights"]), []).append(row)
    results = []
    for (method, p, k, weights), group in groups.items():
        lr = min((row for row in group if row["seed"] == rows[0]["seed"]), key=lambda row: row["val_loss"])["lr"]
        losses = [row["val_loss"] for row in group if row["lr"] == lr]
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        results.append(Result(method, p, k, weights, lr, statistics.fmean(losses), deviation, len(losses)))
    return results


def as_table(results: list[Result]) -> str:
    """The phantom models beside their controls, as Markdown."""
    by_model = {(r.method, r.p, r.k): r for r in results}

    def loss(r: Result | None) -> str:
        return "" if r is None else f"{r.mean:.3f} ± {r.deviation:.3f} | {r.lr:g}"

    dense = by_model[("dense", None, None)]
    lines = [
        "| model | weights | loss | best lr | narrow dense of as many weights | best lr |",
        "|---|---|---|---|---|---|",
        f"| dense | {dense.weights:,} | {loss(dense)} | | |",
    ]
    for r in results:
        if r.method == "phantom":
            narrow = by_model.get(("narrow", r.p, r.k))
            lines.append(f"| p = {r.p}, k = {r.k} | {r.weights:,} | {loss(r)} | {loss(narrow) or '|'} |")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    """Loss against phantom width by number of blocks, and against parameters beside the narrow dense models."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ablation"  # the same file for the same figures
    (dense,) = (r for r in results if r.method == "dense")
    narrow = sorted((r for r in results if r.method in ("narrow", "dense")), key=lambda r: r.weights)
    figure, (by_width, by_weights) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    by_width.axhline(dense.mean, color="black", linewidth=1)
    by_width.axhspan(dense.mean - dense.deviation, dense.mean + dense.deviation, color="black", alpha=0.1)
    by_weights.errorbar(
        [r.weights for r in narrow],
        [r.mean for r in narrow],
        [r.deviation for r in narrow],
        color="black",
        marker=".",
        linewidth=1,
        capsize=2,
        label="dense, and narrower",
    )
    for n, p in enumerate(sorted({r.p for r in results if r.method == "phantom"})):
        chosen = sorted((r for r in results if r.method == "phantom" and r.p == p), key=lambda r: r.k)
        style = {
            "color": f"C{n}",
            "marker": "os^Dv"[n % 5],
            "markersize": 5,
            "capsize": 2,
            "label": f"phantom, p = {p}",
        }
        means, deviations = [r.mean for r in chosen], [r.deviation for r in chosen]
        by_width.errorbar([r.k for r in chosen], means, deviations, **style)
        by_weights.errorbar([r.weights for r in chosen], means, deviations, **style)
    by_width.set(xlabel="phantom width k", ylabel="validation loss, nats per byte")
    by_width.set_xscale("log", base=2)
    by_width.xaxis.set_major_formatter("{x:g}")
    by_weights.set(xlabel="parameters of the model")
    by_weights.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (by_width, by_weights):
        axes.grid(alpha=0.3)
    figure.legend(*by_weights.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    seeds = "-".join(map(str, sorted({r.seeds for r in results})))
    figure.suptitle(f"Best learning rate each; mean and standard deviation, seeds: {seeds}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
