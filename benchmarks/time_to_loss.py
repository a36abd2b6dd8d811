r"""Steps and time to a validation loss, tensor parallel and phantom, each at its best learning rate, over seeds.

    python -m benchmarks.time_to_loss examples/digits.yaml --target-loss 0.12 --train-steps 330 --validate-every 11
    python -m benchmarks.time_to_loss examples/lm.yaml --target-loss 2.6 --train-steps 300 --validate-every 20 \
        --lrs 1e-3 2e-3 4e-3 --trainer.limit_val_batches=20

Every fit is one of `lightning-phantom compare`, two ranks here, the methods in turn. With the first seed each method
runs at every learning rate of the grid; the one that reaches the target in the fewest steps is its best. Then it runs
at that one with every seed. Results are kept in `--folder`; what is there is not run again.
Anything else overrides the config, as for `compare`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("tensor_parallel", "phantom")


def compare(args: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """The record of one comparison; run now unless its file is there."""
    file = args.folder / f"{name}.json"
    if not file.exists():
        print(f"running {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "lightning_phantom", "compare", "--config", args.config]
        command += ["--methods", ",".join(METHODS), "--ranks", "2", "--rounds", "1", "--json", str(file)]
        command += ["--target-loss", str(args.target_loss), "--train-steps", str(args.train_steps)]
        command += ["--validate-every", str(args.validate_every), *args.overrides, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())["methods"]


def spread(values: list[float | None], digits: int) -> str:
    """Mean and standard deviation, or how many runs did not get there."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"not reached in {len(values) - len(there)} of {len(values)}"
    return f"{statistics.mean(there):.{digits}f} ± {statistics.stdev(there):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="as for `lightning-phantom fit`; the model has a setting lr")
    parser.add_argument("--target-loss", type=float, required=True)
    parser.add_argument("--train-steps", type=int, required=True)
    parser.add_argument("--validate-every", type=int, required=True, help="steps")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="default: outputs/time_to_loss/NAME_OF_THE_CONFIG")
    args, args.overrides = parser.parse_known_args()
    args.folder = args.folder or Path("outputs/time_to_loss") / Path(args.config).stem
    args.folder.mkdir(parents=True, exist_ok=True)

    first = f"--seed_everything={args.seeds[0]}"
    grid = {lr: compare(args, f"lr_{lr}", first, f"--model.lr={lr}") for lr in args.lrs}
    best: dict[str, float] = {}
    for method in METHODS:
        steps = {lr: grid[lr][method]["to_target"]["steps"] for lr in args.lrs}
        losses = {lr: grid[lr][method]["val_loss"] for lr in args.lrs}
        best[method] = min(args.lrs, key=lambda lr: (steps[lr] or args.train_steps + 1, losses[lr]))
        tried = ", ".join(f"{lr:g}: {steps[lr] or 'never'} (last loss {losses[lr]:.4f})" for lr in args.lrs)
        print(f"{method}, steps to {args.target_loss} by learning rate: {tried}")
    chosen = [f"--set={method}.model.lr={best[method]}" for method in METHODS]
    runs = [
        compare(args, f"seed_{seed}_{best['tensor_parallel']}_{best['phantom']}", f"--seed_everything={seed}", *chosen)
        for seed in args.seeds
    ]
    print(f"\n| {len(runs)} seeds | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
    rows: dict[str, Any] = {
        "learning rate": lambda method: f"{best[method]:g}",
        f"steps to {args.target_loss}": lambda m: spread([run[m]["to_target"]["steps"] for run in runs], 0),
        "seconds of training to it": lambda m: spread([run[m]["to_target"]["seconds"] for run in runs], 2),
        f"loss after {args.train_steps} steps": lambda m: spread([run[m]["val_loss"] for run in runs], 4),
        "bytes sent per rank and step": lambda m: f"{runs[0][m]['sent_bytes']:,.0f}",
        "weights per rank": lambda m: f"{runs[0][m]['weights']:,}",
    }
    for name, value in rows.items():
        print(f"| {name} | " + " | ".join(value(method) for method in METHODS) + " |")


if __name__ == "__main__":
    main()
