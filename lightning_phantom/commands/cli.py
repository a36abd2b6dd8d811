"""The command `lightning-phantom`: Lightning's own CLI, with the strategies of this package registered.

lightning-phantom fit --config run.yaml
lightning-phantom fit --config run.yaml --trainer.strategy PhantomStrategy --trainer.strategy.num_blocks 8
lightning-phantom validate --config run.yaml --ckpt_path best.ckpt
lightning-phantom convert dense.ckpt phantom.ckpt --config run.yaml --num-blocks 8
lightning-phantom plan --config run.yaml
lightning-phantom compare --config run.yaml --ranks 2
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import lightning_phantom
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import cli, pl

# Commands beside Lightning's own: the module whose main(args) runs each, and what it does.
COMMANDS = {
    "plan": ("lightning_phantom.commands.plan", "what would be swapped, and its cost against tensor parallelism"),
    "convert": ("lightning_phantom.commands.convert", "dense checkpoint <-> phantom checkpoint"),
    "compare": (
        "lightning_phantom.commands.compare.command",
        "phantom, tensor parallel and dense training, measured side by side",
    ),
}


class _CLI(cli.LightningCLI):
    def _parse_ckpt_path(self) -> None:
        """Make the model as the config says, also with `--ckpt_path`.

        Newer releases of Lightning put the hyper-parameters of the checkpoint into the config here, which refuses every
        checkpoint that was saved without LightningCLI: they do not name the class.
        """


def main(args: Sequence[str] | None = None) -> None:
    """Run `fit`, `validate`, `test` or `predict` on the module and data that a config names, or one of `COMMANDS`.

    Args:
        args: the command line without the program's name; None takes the process's own.
    """
    # A console script, unlike `python -m`, does not look for the user's modules where it is called.
    sys.path.insert(0, os.getcwd())
    arguments = sys.argv[1:] if args is None else list(args)
    if arguments and arguments[0] in COMMANDS:
        try:
            importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
        except PhantomError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return
    others = "; ".join(f"{name}: {what}" for name, (_, what) in COMMANDS.items())
    _CLI(
        pl.LightningModule,
        None,  # any data, or none: a module may bring its own
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lightning-phantom",
            "description": "Train with phantom parallelism: any LightningModule and data, from a config. "
            f"Other commands, each with its own --help: {others}.",
            "version": lightning_phantom.__version__,
        },
        args=None if args is None else arguments,
    )
