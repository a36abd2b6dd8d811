"""The command `lightning-phantom convert`: dense checkpoint <-> phantom checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_phantom.calibration_run import CalibrationRun
from lightning_phantom.config import PhantomConfig
from lightning_phantom.conversion import check_state, read, to_fewer_blocks, to_phantom, to_plain, width_setting
from lightning_phantom.conversion_report import ConversionReport
from lightning_phantom.errors import PhantomError
from lightning_phantom.ffn import plan_phantom
from lightning_phantom.files import AtomicCheckpointIO
from lightning_phantom.swap import nothing_qualifies

DESCRIPTION = """\
Convert a checkpoint: dense to phantom, phantom to fewer blocks, phantom to dense.

  lightning-phantom convert dense.ckpt phantom.ckpt --config run.yaml --num-blocks 4
  lightning-phantom convert dense.ckpt phantom.ckpt --config run.yaml --num-blocks 4 --calibrate 16
  lightning-phantom convert phantom8.ckpt phantom4.ckpt --merge 2
  lightning-phantom convert phantom.ckpt dense.ckpt --to dense

Takes checkpoints of this package and of Lightning, and bare state dicts with the keys of the LightningModule. Writes
one file, whole or not at all, with weights alone: a fit with ckpt_path= starts from it at epoch 0 with a new optimizer.
"""
Converted = tuple[dict[str, Any], ConversionReport, str]  # the last: how to go on with it


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command line after `convert`.
    """
    parser = _parser()
    options = parser.parse_args(args)
    try:
        _check(options)
        checkpoint, report, use = _convert(options)
        AtomicCheckpointIO().save_checkpoint(checkpoint, options.output)
        if options.report is not None:
            options.report.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    except PhantomError as error:
        raise SystemExit(f"lightning-phantom convert: {error}") from error
    _print(report)
    print(f"{options.output} was written. {use}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-phantom convert", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="the checkpoint to read")
    parser.add_argument("output", type=Path, help="the checkpoint to write")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--to", choices=("phantom", "dense"), default="phantom", help="what to write (default: phantom)"
    )
    target.add_argument("--merge", type=int, metavar="Q", help="make one block of every Q; exactly the same function")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--trust", action="store_true", help="read an INPUT that holds pickled objects; they can run any code"
    )
    dense = parser.add_argument_group("dense to phantom")
    dense.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="RUN.YAML",
        help="the config of `lightning-phantom fit`, or several, each with its own --config: its model says which "
        "linears there are, its data calibrates, and "
        "what follows is taken from its strategy if that is a PhantomStrategy",
    )
    dense.add_argument("--num-blocks", type=int, metavar="P", help="the number of blocks")
    dense.add_argument(
        "--phantom-width", type=_number, metavar="K", help="k, or a fraction of the block width (default: 0.25)"
    )
    dense.add_argument(
        "--plan",
        type=_plan,
        metavar="PLAN",
        help='YAML, or a file of it: {"*.mlp.*": phantom} (default: find the FFNs)',
    )
    dense.add_argument(
        "--calibrate",
        type=int,
        metavar="N",
        help="fit the layers to what they are given in N batches of the train_dataloader, and measure them on N of the "
        "val_dataloader; batches go through validation_step",
    )
    return parser


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _plan(text: str) -> Any:
    return yaml.safe_load(Path(text).read_text() if Path(text).is_file() else text)


def _check(options: argparse.Namespace) -> None:
    """Raise PhantomError for options that do not go together, before anything is read."""
    for path in (options.output, options.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise PhantomError(f"{path}: there is no folder {path.absolute().parent}.")
        if path is not None and path.exists() and (not options.force or path.is_dir()):
            raise PhantomError(f"{path} is there already; --force replaces a file.")
    from_dense = {"--config": options.config, "--num-blocks": options.num_blocks, "--plan": options.plan}
    from_dense |= {"--phantom-width": options.phantom_width, "--calibrate": options.calibrate}
    if options.merge is not None or options.to == "dense":
        given = [name for name, value in from_dense.items() if value is not None]
        if given:
            raise PhantomError(f"{', '.join(given)}: only for a conversion from dense to phantom.")
    elif options.config is None:
        raise PhantomError("--config is needed: its model says which linears of the checkpoint form FFNs.")
    for path in options.config or ():
        if not path.is_file():
            raise PhantomError(f"--config {path}: there is no such file.")
    if options.calibrate is not None and options.calibrate < 1:
        raise PhantomError(f"--calibrate {options.calibrate}: needs at least one batch.")


def _convert(options: argparse.Namespace) -> Converted:
    checkpoint = read(options.input, options.trust)
    folder = options.output.absolute().parent
    if options.merge is not None:
        with _progress(len(checkpoint.get("phantom", {}).get("layers", ()))) as advance:
            merged, report = to_fewer_blocks(checkpoint, options.merge, folder, advance)
            # With fewer blocks more layers divide, and fewer shrink, so the plan that a strategy finds can be another.
            named = dict.fromkeys(merged["phantom"]["layers"], "phantom")
            return merged, report, _use(merged["phantom"]["num_blocks"], width_setting(merged), named)
    if options.to == "dense":
        return *to_plain(checkpoint), "Any strategy takes it, as ckpt_path=, and so does load_from_checkpoint."
    run = _read_config(options.config)
    config = _phantom_config(options, run.strategy)
    plan = plan_phantom(run.module, config)
    if not plan.swapped:
        raise nothing_qualifies(run.module, plan)
    check_state(run.module, checkpoint["state_dict"], plan)
    calibration = None
    if options.calibrate is not None:
        run.module.load_state_dict(checkpoint["state_dict"], strict=run.module.strict_loading)
        calibration = CalibrationRun(run.trainer, run.module, run.datamodule, options.calibrate)
    with _progress(len(plan.swapped)) as advance:
        converted = to_phantom({**_hyper_parameters(run), **checkpoint}, plan, folder, calibration, advance)
        return *converted, _use(config.num_blocks, config.phantom_width, config.plan)


@dataclass(frozen=True)
class _Run:
    """What a config asks for; the trainer is one of a single device."""

    module: L.LightningModule
    datamodule: L.LightningDataModule
    trainer: L.Trainer
    strategy: Any


class _Reader(LightningCLI):
    """Makes what the config of a fit names, without its strategy, callbacks and loggers, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config["fit"]["trainer"]
        self.strategy = trainer["strategy"]
        alone: Mapping[str, Any] = {
            **{"strategy": "auto", "devices": 1, "num_nodes": 1, "callbacks": None, "logger": False, "profiler": None},
            **{"fast_dev_run": False, "limit_val_batches": 1.0, "limit_predict_batches": 1.0, "barebones": False},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        }
        for key, value in alone.items():
            trainer[key] = value

    def after_instantiate_classes(self) -> None:
        self.subcommand = None


def _read_config(paths: Sequence[Path]) -> _Run:
    cli = _Reader(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        parser_kwargs={"prog": "lightning-phantom convert"},
        args=["fit", *(f"--config={path}" for path in paths)],
    )
    if is_overridden("configure_model", cli.model):
        cli.model.configure_model()
    return _Run(cli.model, cli.datamodule, cli.trainer, cli.strategy)


def _phantom_config(options: argparse.Namespace, strategy: Any) -> PhantomConfig:
    """What the command line asks for, and for the rest the strategy of the config."""
    theirs = {}
    if str(getattr(strategy, "class_path", "")).endswith("PhantomStrategy"):
        theirs = {key: strategy.init_args.get(key) for key in ("num_blocks", "phantom_width", "plan")}
    ours = {key: getattr(options, key) for key in ("num_blocks", "phantom_width", "plan")}
    chosen = {key: theirs.get(key) if value is None else value for key, value in ours.items()}
    if chosen["num_blocks"] is None:
        raise PhantomError("--num-blocks is needed: the config's strategy does not say how many blocks.")
    return PhantomConfig(**{key: value for key, value in chosen.items() if value is not None})


def _hyper_parameters(run: _Run) -> dict[str, Any]:
    """What `load_from_checkpoint` needs, as Lightning saves it; for state dicts that come without."""
    if not run.module.hparams:
        return {}
    name = getattr(run.module, "_hparams_name", None)
    return {
        **({"hparams_name": name} if name else {}),
        run.module.CHECKPOINT_HYPER_PARAMS_KEY: dict(run.module.hparams),
    }


def _use(num_blocks: int, phantom_width: int | float, plan: Mapping[str, str] | None) -> str:
    """How to go on with a phantom checkpoint."""
    named = f", plan={dict(plan)}" if plan is not None else ""
    return (
        f"Take it with PhantomStrategy(num_blocks={num_blocks}, phantom_width={phantom_width}{named}), as ckpt_path= "
        f"of fit or validate."
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over layers; what it yields is called with the name of each."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=total)

        def advance(name: str) -> None:
            progress.update(task, description=name, advance=1)

        yield advance


def _print(report: ConversionReport) -> None:
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 140).print(report)
