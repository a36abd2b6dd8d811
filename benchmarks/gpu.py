"""Everything of this project that waits for a GPU, one part after the other, with a report at the end.

    benchmarks/gpu.sh                          # writes outputs/gpu/report.json
    benchmarks/gpu.sh --device cpu --small     # the same programs in small where there is no GPU, to see that they run

tests     those marked `gpu`: two ranks on one device over gloo among them, and on two over NCCL where there are two
layer     a phantom layer's forward and backward over nn.Linear's: n = 16384, p = 8, k = 128, 4096 tokens, bfloat16; the
          ratio of times is to be at most 1.25 times that of FLOPs, 0.1875
latency   inference of phantom models over dense ones
window    examples/window.yaml on one device, dense, phantom and smaller: steps, seconds and joules to equal loss, with
          three seeds; the joules are to be counted, not modelled

A part that fails does not stop the others; the exit code says whether all held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import layer

ROOT = Path(__file__).parents[1]
WINDOW = ROOT / "examples" / "window.yaml"
METHODS = ("ddp", "phantom", "smaller")  # on one rank DDP is the dense model alone
COUNTED = ("measured_counter", "sampled_power")
Outcome = tuple[bool | None, list[str]]  # whether it holds (None: it was left out), and what was seen


def run(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run a Python program in the repository's root; its exit code and what it printed."""
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return ended.returncode, ended.stdout if ended.returncode == 0 else ended.stdout + ended.stderr


def tests(args: argparse.Namespace) -> Outcome:
    """The tests marked `gpu`."""
    code, out = run("-m", "pytest", "-q", "-m", "gpu", "-rs", "tests/test_gpu.py", PHANTOM_GPU_TESTS=args.device)
    return code == 0, out.splitlines()[-20:]


def layers(args: argparse.Namespace) -> Outcome:
    """One layer."""
    sizes = (64, 4, 4, 32, "float32") if args.small else (16384, 8, 128, 4096, "bfloat16")
    seen = layer.compare(*sizes, args.device, repeats=3 if args.small else 25)
    most = 1.25 * seen["flop_ratio"]
    lines = layer.lines(seen)
    return args.small or seen["time_ratio"] <= most, [*lines, f"at most    {most:8.4f}"]


def latency(args: argparse.Namespace) -> Outcome:
    """Inference."""
    sizes = ["--blocks", 4, "--features", 64, "--tokens", 8, "--repeats", 2] if args.small else ["--features", 4096]
    code, out = run("-m", "benchmarks.latency", "--device", args.device, *sizes)
    return code == 0, out.splitlines()


def window(args: argparse.Namespace) -> Outcome:
    """The deep network on text, to equal loss."""
    if not WINDOW.exists():
        return None, [f"there is no {WINDOW.relative_to(ROOT)}"]
    lines, counted = [], True
    for seed in (0,) if args.small else (0, 1, 2):
        target = args.out / f"window_{seed}.json"
        code, out = run(
            "-m", "lightning_phantom", "compare", "--config", WINDOW, *compare_arguments(args, seed, target)
        )
        if code:
            return False, [*lines, *out.splitlines()[-20:]]
        seen, flags = to_equal_loss(json.loads(target.read_text()))
        lines += [f"seed {seed}: {line}" for line in seen]
        counted = counted and flags <= set(COUNTED)
    return args.small or counted, lines


def compare_arguments(args: argparse.Namespace, seed: int, target: Path) -> list[object]:
    """One fit of each method on one rank, with the meter on: no loss is at 0."""
    small = ["--model.embedding", 4, "--data.batch_size", 16, "--trainer.limit_val_batches", 2]
    steps, every = (6, 2) if args.small else (3200, 100)
    return [
        *("--ranks", 1, "--num-blocks", 4 if args.small else 8, "--methods", ",".join(METHODS)),
        *("--rounds", 1, "--steps", 2, "--warmup", 2, "--train-steps", steps, "--validate-every", every),
        *("--target-loss", 0, "--json", target, "--seed_everything", seed),
        *("--trainer.accelerator", "gpu" if args.device == "cuda" else "cpu"),
        *(small if args.small else ("--data.batch_size", 128)),
    ]


def to_equal_loss(result: dict[str, Any]) -> tuple[list[str], set[str]]:
    """What each method took to the lowest loss that all of them have seen; and the flags of their joules."""
    ranks = {run["method"]: run["ranks"][0] for run in result["runs"]}
    target = max(min(loss for _, _, loss in rank["losses"]) for rank in ranks.values())
    lines, flags = [], set()
    for method, rank in ranks.items():
        steps, seconds = next((step, s) for step, s, loss in rank["losses"] if loss <= target)
        energy = rank["energy"] or {"steady_j_per_step": None, "flag": "failed"}
        flags.add(energy["flag"])
        joules = "-" if energy["steady_j_per_step"] is None else f"{steps * energy['steady_j_per_step']:.4g}"
        lines.append(
            f"{method:8} to {target:.4f}: {steps} steps, {seconds:.2f} s, {joules} J ({energy['flag']}); "
            f"{rank['weights']:,} weights, loss in the end {rank['losses'][-1][2]:.4f}"
        )
    return lines + [f"left out: {method}: {why}" for method, why in result["left_out"].items()], flags


PARTS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    **{"tests": tests, "layer": layers, "latency": latency, "window": window},
}


def main() -> None:
    """Run the parts, and write and print the report."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, formatter_class=kind)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, of which nothing is to be learnt")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder (default: outputs/gpu)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small tries the programs without one.")
    args.out.mkdir(parents=True, exist_ok=True)
    on = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    devices = torch.cuda.device_count() if args.device == "cuda" else 0
    report: dict[str, Any] = {"device": on, "devices": devices, "torch": torch.__version__, "small": args.small}
    report["parts"] = {}
    for name, part in PARTS.items():
        begun = time.perf_counter()
        try:
            holds, lines = part(args)
        except Exception as error:  # whatever a part may meet on a machine that it has never run on
            holds, lines = False, [repr(error)]
        took = time.perf_counter() - begun
        word = "left out" if holds is None else "holds" if holds else "FAILS"
        report["parts"][name] = {"holds": holds, "seconds": took, "lines": lines}
        print(f"\n{name}: {word} ({took:.0f} s)", *lines, sep="\n  ", flush=True)
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    raise SystemExit(any(part["holds"] is False for part in report["parts"].values()))


if __name__ == "__main__":
    main()
