"""What the commands share on the terminal: how arguments are read, work is shown to advance, and tables are printed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_phantom.errors import PhantomError

WIDTH = 190  # of tables, where the output is no terminal
# Methods by their names in options and in JSON, and what tables call them.
LABELS = {
    "ddp": "DDP",
    "fsdp": "FSDP",
    "tensor_parallel": "TP, Megatron's pairs",
    "tensor_parallel_layerwise": "TP, layer by layer",
    "tensor_parallel_torch": "TP, torch's own",
    "phantom": "phantom",
    "smaller": "smaller dense, DDP",
}


def command_parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of its texts, and which takes no abbreviations for options."""
    return argparse.ArgumentParser(
        prog=f"lightning-phantom {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Options for the config of a run, and for that of the smaller dense model: one file, or several as for `fit`."""
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "FILE"}
    each = "or several, each with its own"
    parser.add_argument(
        "--config", required=required, **several, help=f"the config of the run, {each} --config, as for `fit`"
    )
    parser.add_argument(
        "--smaller",
        **several,
        help=f"the config of the smaller dense model, {each} --smaller (default: --config, narrower)",
    )


def phantom_width(text: str) -> int | float:
    """A phantom width on a command line: 1 is an int, 1.0 a fraction."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def output_file(option: str, text: str | None) -> Path | None:
    """Where a command is to write, in a folder that exists: said before the work, not after it."""
    if text is not None and not Path(text).absolute().parent.is_dir():
        raise PhantomError(f"{option} {text}: there is no such folder; make it first.")
    return None if text is None else Path(text)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal; gives the function that says what of the `total` comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, begun = bar.add_task("", total=total), itertools.count()

        def advance(words: str) -> None:
            bar.update(task, description=words, completed=next(begun))

        yield advance


def show(*renderables: Any, **kwargs: Any) -> None:
    """Print tables and lines, as wide as the terminal or, where there is none, wide enough."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    for renderable in renderables:
        console.print(renderable, **kwargs)
