"""The command `lightning-phantom`: Lightning's own CLI, with the strategies of this package registered, and more.

lightning-phantom fit --config run.yaml
lightning-phantom fit --config run.yaml --trainer.strategy PhantomStrategy --trainer.strategy.num_blocks 8
lightning-phantom validate --config run.yaml --ckpt_path best.ckpt
lightning-phantom plan --config run.yaml
lightning-phantom compare --config run.yaml --ranks 2
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import lightning as L
from lightning.pytorch.cli import LightningCLI

import lightning_phantom
from lightning_phantom.errors import PhantomError

# Commands beside Lightning's own: the module whose `main(args)` runs each, and what it does.
COMMANDS = {
    "plan": ("lightning_phantom.plan_command", "what would be swapped, and its cost against tensor parallelism"),
    "compare": ("lightning_phantom.compare", "phantom, tensor parallel and dense training, measured side by side"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run `fit`, `validate`, `test` or `predict` on the module and data that a config names, or one of `COMMANDS`.

    Args:
        args: the command line without the program's name; None takes the process's own.
    """
    # A console script, unlike `python -m`, does not look for the user's modules where it is called.
    sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else list(args)
    if given and given[0] in COMMANDS:
        try:
            import_module(COMMANDS[given[0]][0]).main(given[1:])
        except PhantomError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return
    others = "; ".join(f"`{name}`: {does}" for name, (_, does) in COMMANDS.items())
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lightning-phantom",
            "description": (
                "Train with phantom parallelism: any LightningModule and data, from a config. "
                f"Further commands, each with a --help of its own: {others}."
            ),
            "version": lightning_phantom.__version__,
        },
        args=None if args is None else given,
    )
