"""Draws random modules by their seeds, many more than the gate, and has each refused or trained like its oracle.

    python benchmarks/fuzz.py --count 1000 --first 0
    python benchmarks/fuzz.py --count 440 --ranks 2

On one rank a module is compared with the dense float64 function that its factors stand for; on several, with one rank
that holds all of it. What differs is printed with its seed; the exit code is then 1.
The modules are those of `tests/test_fuzz.py`.
"""

import argparse
import random
import sys
from pathlib import Path

tests = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(tests / "helpers"), str(tests)]

from ranks import run_ranks  # noqa: E402
from test_fuzz import becomes_of, one_and_several_ranks  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="modules to draw (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="(default: 1)")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.count)
    verdicts: dict[int, str] = {}
    if args.ranks == 1:
        for seed in seeds:
            try:
                verdicts[seed] = becomes_of(random.Random(seed))
            except AssertionError as error:
                verdicts[seed] = f"seed {seed}: {error}"
    else:
        for mine in run_ranks(args.ranks, one_and_several_ranks, seeds, timeout_s=3 * args.count + 240):
            verdicts.update(mine)
    wrong = [verdict for _, verdict in sorted(verdicts.items()) if verdict.startswith("seed")]
    print(*wrong, sep="\n\n")
    trained = sum(verdict == "trained" for verdict in verdicts.values())
    print(f"{len(seeds)} modules: {trained} trained, {len(seeds) - trained - len(wrong)} refused, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
