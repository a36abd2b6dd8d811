"""What importing the package costs a program that has imported Lightning.

    python benchmarks/import_time.py

Every figure is from a process of its own.
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import time
begin = time.perf_counter(); import lightning.pytorch
middle = time.perf_counter(); import lightning_phantom; lightning_phantom.PhantomStrategy
print(middle - begin, time.perf_counter() - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="processes (default: 5)")
    runs = []
    for _ in range(parser.parse_args().runs):
        out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
        runs.append([float(seconds) for seconds in out.split()])
    for name, seconds in zip(
        ("lightning.pytorch", "lightning_phantom, after it"), zip(*runs, strict=True), strict=True
    ):
        print(f"{name:28}{statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
