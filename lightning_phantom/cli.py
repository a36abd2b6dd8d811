"""The command `lightning-phantom`: Lightning's own CLI, with the strategies of this package registered.

lightning-phantom fit --config run.yaml
lightning-phantom fit --config run.yaml --trainer.strategy PhantomStrategy --trainer.strategy.num_blocks 8
lightning-phantom validate --config run.yaml --ckpt_path best.ckpt
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.cli import LightningCLI

import lightning_phantom


def main(args: Sequence[str] | None = None) -> None:
    """Run `fit`, `validate`, `test` or `predict` on the module and data that a config names.

    Args:
        args: the command line without the program's name; None takes the process's own.
    """
    # A console script, unlike `python -m`, does not look for the user's modules where it is called.
    sys.path.insert(0, os.getcwd())
    LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lightning-phantom",
            "description": "Train with phantom parallelism: any LightningModule and data, from a config.",
            "version": lightning_phantom.__version__,
        },
        args=None if args is None else list(args),
    )
