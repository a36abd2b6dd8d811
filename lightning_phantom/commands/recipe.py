"""Reads the config of a run as `lightning-phantom fit` does, and makes from it only what a command needs."""

from __future__ import annotations

import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_phantom.config import num_blocks_of_environment
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import cli, pl
from lightning_phantom.strategies.phantom import PhantomStrategy
from lightning_phantom_autoload import NAMES


class Recipe(cli.LightningCLI):
    """A parsed config: nothing is made until it is asked for.

    Args:
        files: paths of the config's files, later ones over earlier ones.
        args: what overrides them, as for `fit`: `--model.lr 0.1`.
        prog: what errors call the command.

    Raises:
        SystemExit: the arguments do not fit the config; LightningCLI has said why.
    """

    def __init__(self, files: Sequence[str | Path], args: Sequence[str], prog: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                pl.LightningModule,
                None,  # any data, or none: a module may bring its own
                subclass_mode_model=True,
                save_config_callback=None,
                parser_kwargs={"prog": prog},
                args=[*(f"--config={file}" for file in files), *args],
                run=False,
            )

    def add_arguments_to_parser(self, parser: cli.LightningArgumentParser) -> None:
        """Let the config hold what `fit` saves beside it, which counts for nothing here."""
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)

    def _set_seed(self) -> None:
        """Seed nothing yet."""

    def instantiate_classes(self) -> None:
        """Make nothing yet."""

    def make_module(self, **changes: Any) -> pl.LightningModule:
        """A fresh module; `changes` take the place of arguments of its own."""
        if self.config.get("model") is None:
            raise PhantomError("the config names no model: give --config run.yaml with a `model:` in it.")
        return self._make("model", **changes)

    def make_data(self) -> pl.LightningDataModule | None:
        """Fresh data, or None where the module brings its own."""
        return None if self.config.get("data") is None else self._make("data")

    def make_trainer(self, **changes: Any) -> pl.Trainer:
        """A Trainer with the config's settings, but for `changes`."""
        settings = self.config.trainer.clone()
        for name in changes:
            settings[name] = None  # not made in vain
        made = self.parser.instantiate_classes(Namespace(trainer=settings))["trainer"]
        return pl.Trainer(**{**made, **changes})

    def phantom_arguments(self, **chosen: Any) -> dict[str, Any]:
        """Arguments of PhantomStrategy: those `chosen`, for what is None there the config's, then the environment's."""
        strategy, given = self.config.trainer.strategy, {}
        if isinstance(strategy, Namespace) and strategy.class_path.rpartition(".")[2] == PhantomStrategy.__name__:
            given = {**strategy.get("init_args", {}), **strategy.get("dict_kwargs", {})}
        elif isinstance(strategy, str) and strategy in NAMES:
            given = dict(NAMES[strategy][1])
        settled = {name: value for name, value in (*given.items(), *chosen.items()) if value is not None}
        if "num_blocks" not in settled and (blocks := num_blocks_of_environment()) is not None:
            settled["num_blocks"] = blocks
        return settled

    @property
    def seed(self) -> int:
        """What `seed_everything` asks for; 0 where it asks for nothing, or for a seed of any kind."""
        seed = self.config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0

    def config_ranks(self) -> int | None:
        """How many ranks the config's Trainer starts; None where it is left to the machine."""
        devices, nodes = self.config.trainer.devices, self.config.trainer.num_nodes
        if isinstance(devices, (list, tuple)):
            devices = len(devices)
        return int(devices) * nodes if str(devices).isdigit() else None

    def _make(self, part: str, **changes: Any) -> Any:
        config = self.config[part].clone()
        for name, value in changes.items():
            config["init_args"][name] = value
        return self.parser.instantiate_classes(Namespace(**{part: config}))[part]
