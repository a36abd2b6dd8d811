"""The language model of examples/lm.py, side by side: dense, phantom and tensor parallel, over seeds.

    python -m benchmarks.lm                                  # dense and phantom, three seeds each
    python -m benchmarks.lm --methods dense phantom tensor_parallel
    python -m benchmarks.lm --table-only                     # from the runs that are there

Each run is `lightning-phantom fit --config examples/lm.yaml --config examples/lm_METHOD.yaml` with another seed, in a
folder of its own; what a folder holds already is not run again. The table gives means and, where there is more than
one seed, standard deviations. What a figure of energy is worth stands beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm


def main() -> None:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm", description=__doc__, formatter_class=kind)
    parser.add_argument("--methods", nargs="+", default=["dense", "phantom"], help="of examples/lm_METHOD.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="initialisation and batches (0 1 2)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/lm_benchmark"), help="the runs (%(default)s)")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    args, overrides = parser.parse_known_args()  # what is left, such as --trainer.max_steps=100, goes to every run
    todo = [(method, seed) for seed in args.seeds for method in args.methods]
    for method, seed in tqdm(todo, desc="runs", disable=args.table_only):
        folder = args.folder / f"{method}-{seed}"
        if not args.table_only and not report_of(folder, "run_report.json"):
            fit(method, seed, folder, overrides)
    print(table(args.folder, args.methods, args.seeds))


def fit(method: str, seed: int, folder: Path, overrides: list[str]) -> None:
    """Run one fit in a process of its own, one CPU thread per rank; its output goes to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lightning_phantom", "fit", "--config=examples/lm.yaml"]
    command += [f"--config=examples/lm_{method}.yaml", f"--seed_everything={seed}"]
    command += [f"--trainer.logger.init_args.save_dir={folder}", *overrides]
    with (folder / "output.txt").open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {run.returncode}; see {folder / 'output.txt'}")


def report_of(folder: Path, name: str) -> dict:
    """The newest report of that name below a folder; empty when there is none."""
    found = sorted(folder.glob(f"**/{name}"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text()) if found else {}


def table(folder: Path, methods: list[str], seeds: list[int]) -> str:
    """The runs as a Markdown table, a column per method."""
    columns = []
    for method in methods:
        folders = [folder / f"{method}-{seed}" for seed in seeds]
        runs = [(run, report_of(f, "energy_report.json")) for f in folders if (run := report_of(f, "run_report.json"))]
        columns.append([method.replace("_", " "), *column(runs)] if runs else [method, *["not run"] * len(ROWS)])
    lines = list(zip(["", *ROWS], *columns, strict=True))
    lines.insert(1, tuple("---" for _ in lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ROWS = (
    "ranks",
    "steps",
    "seeds",
    "validation loss, nats per byte",
    "the same in bits per byte",
    "weights per rank",
    "bytes sent per rank and step",
    "collectives per step",
    "GPU energy",
    "CPU energy",
    "RAM energy",
    "energy per steady step",
    "duration of the fit",
)


def column(runs: list[tuple[dict, dict]]) -> list[str]:
    """The figures of one method, in the order of ROWS."""
    first, energy = runs[0]
    flags = energy["flags"]

    def joules(part: str) -> str:
        values = [report["total"][f"{part}_J"] for _, report in runs]
        return "unavailable" if None in values else f"{spread(values, '{:,.0f}')} J, {flags[part]}"

    steady = [report["steady"]["J_per_step"] for _, report in runs]
    return [
        f"{first['ranks']}",
        f"{first['steps']}",
        f"{len(runs)}",
        spread([run["validation"]["val_loss"] for run, _ in runs], "{:.3f}"),
        spread([run["validation"]["val_bits_per_byte"] for run, _ in runs], "{:.3f}"),
        f"{first['weights_per_rank']:,}",
        f"{first['sent_bytes_per_step']:,}",
        f"{first['collectives_per_step']}",
        *map(joules, ("gpu", "cpu", "ram")),
        "unavailable" if None in steady else f"{spread(steady, '{:.2f}')} J, {flags['total']}",
        f"{spread([report['total']['duration_s'] for _, report in runs], '{:.0f}')} s",
    ]


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there is one."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


if __name__ == "__main__":
    main()
