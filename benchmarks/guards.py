"""Which guards of a module no test misses: each is taken out in turn, and tests run until one fails.

    python benchmarks/guards.py lightning_phantom/plan/others.py tests/plan/test_structure.py

Taken out are conditions whose branch leaves (return, raise, continue, break), operands of `and` and `or`, and filters
of comprehensions. What is printed, no test of those given misses: it wants a test, or changes nothing and may go, or
only saves time or speaks to the type checker. Works on Linux, in a copy of the repository; each trial is forked from a
process that has imported what takes long, and so are the ranks of its tests.
"""

import argparse
import ast
import copy
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def without_guards(source: str) -> Iterator[tuple[int, str, str]]:
    """The line of each guard, what it says, and the source without it."""
    tree = ast.parse(source)
    for n, node in enumerate(ast.walk(tree)):
        parts = []
        if isinstance(node, ast.If) and isinstance(node.body[-1], LEAVES):
            parts = [0]
        elif isinstance(node, ast.BoolOp):
            parts = list(range(len(node.values)))
        elif isinstance(node, ast.comprehension):
            parts = list(range(len(node.ifs)))
        for part in parts:
            changed = copy.deepcopy(tree)
            guard = next(each for m, each in enumerate(ast.walk(changed)) if m == n)
            if isinstance(guard, ast.If):
                taken, guard.test = guard.test, ast.Constant(False)
            elif isinstance(guard, ast.BoolOp):
                taken, guard.values[part] = guard.values[part], ast.Constant(isinstance(guard.op, ast.And))
            else:
                assert isinstance(guard, ast.comprehension)
                taken = guard.ifs.pop(part)
            line, text = taken.lineno, ast.unparse(taken)
            yield line, text, ast.unparse(ast.fix_missing_locations(changed))


def preload() -> None:
    """Import what takes long, and nothing of the package."""
    for name in ("lightning.pytorch", "torchmetrics", "transformers"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def run_tests(tests: list[str], timeout_s: float) -> bool:
    """Whether the tests pass, run in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(os.devnull, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest
        import torch.multiprocessing as mp

        context = mp.get_context("fork")
        context.set_forkserver_preload = lambda modules: None
        mp.get_context = lambda method=None: context
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> None:
    """Try every guard, and print those that no test misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path, help="from the root of the repository")
    parser.add_argument("tests", nargs="+", help="what pytest is to run")
    parser.add_argument("--timeout", type=float, default=120, help="seconds; tests that take longer have missed it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lightning_phantom", "lightning_phantom_autoload.py", "examples", "tests", "pyproject.toml"):
            copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copied(ROOT / name, Path(folder) / name)
        os.chdir(folder)
        sys.path.insert(0, folder)
        sys.dont_write_bytecode = True  # sources change within a second, which bytecode would not notice
        preload()
        if not run_tests(args.tests, 10 * args.timeout):
            raise SystemExit("the tests fail as it is.")
        source = args.module.read_text()
        guards = list(without_guards(source))
        missed = 0
        for line, text, changed in tqdm(guards):
            args.module.write_text(changed)
            if run_tests(args.tests, args.timeout):
                missed += 1
                tqdm.write(f"{args.module}:{line}: {text}", file=sys.stdout)
        print(f"{len(guards)} guards, {missed} that no test misses")


if __name__ == "__main__":
    main()
