"""The command `lightning-phantom convert`: dense checkpoint <-> phantom checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_phantom.checkpoints.format import names_of, num_blocks_of, phantom_layers_of
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import command_parser, output_file, phantom_width, progress, show
from lightning_phantom.config import PhantomConfig
from lightning_phantom.conversion.calibration_run import CalibrationRun
from lightning_phantom.conversion.files import check_state, read, write
from lightning_phantom.conversion.from_phantom import to_fewer_blocks, to_plain, width_setting
from lightning_phantom.conversion.report import ConversionReport
from lightning_phantom.conversion.to_phantom import to_phantom
from lightning_phantom.errors import PhantomError
from lightning_phantom.framework import pl
from lightning_phantom.plan.finder import plan_phantom
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
# How a module is run on its data by itself: none of its config's strategy, callbacks and loggers.
ALONE: Mapping[str, Any] = {
    **{"strategy": "auto", "devices": 1, "num_nodes": 1, "callbacks": None, "logger": False, "profiler": None},
    **{"fast_dev_run": False, "limit_val_batches": 1.0, "limit_predict_batches": 1.0, "barebones": False},
    **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
}
Converted = tuple[dict[str, Any], ConversionReport, str]  # the last: how to go on with it


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the command line after `convert`.
    """
    options = _parser().parse_args(args)
    _check(options)
    checkpoint, report, use = _convert(options)
    write(checkpoint, options.output)
    if options.report is not None:
        options.report.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    show(report)
    print(f"{options.output} was written. {use}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("convert", DESCRIPTION)
    parser.add_argument("input", type=Path, help="the checkpoint to read")
    parser.add_argument("output", help="the checkpoint to write")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--to", choices=("phantom", "dense"), default="phantom", help="what to write (default: phantom)"
    )
    target.add_argument("--merge", type=int, metavar="Q", help="make one block of every Q; exactly the same function")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it is there")
    parser.add_argument("--report", metavar="FILE", help="also write the report as JSON")
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
        "--phantom-width", type=phantom_width, metavar="K", help="k, or a fraction of the block width (default: 0.25)"
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


def _plan(text: str) -> Any:
    return yaml.safe_load(Path(text).read_text() if Path(text).is_file() else text)


def _check(options: argparse.Namespace) -> None:
    """Raise PhantomError for options that do not go together, before anything is read."""
    options.output = output_file("OUTPUT", options.output)
    options.report = output_file("--report", options.report)
    for path in filter(None, (options.output, options.report)):
        if path.exists() and (not options.force or path.is_dir()):
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
        with progress(len(names_of(checkpoint))) as advance:
            merged, report = to_fewer_blocks(checkpoint, options.merge, folder, advance)
            # With fewer blocks more layers divide, and fewer shrink, so the plan that a strategy finds can be another.
            named = dict.fromkeys(names_of(merged), "phantom")
            mixing = next(iter(phantom_layers_of(merged).values())).mixing
            return merged, report, _use(num_blocks_of(merged), width_setting(merged), named, mixing)
    if options.to == "dense":
        return *to_plain(checkpoint), "Any strategy takes it, as ckpt_path=, and so does load_from_checkpoint."
    recipe = Recipe(options.config, (), "lightning-phantom convert")
    config = _phantom_config(options, recipe)
    module = recipe.make_module()
    if pl.utilities.model_helpers.is_overridden("configure_model", module):
        module.configure_model()
    plan = plan_phantom(module, config)
    if not plan.swapped:
        raise nothing_qualifies(module, plan)
    check_state(module, checkpoint["state_dict"], plan)
    calibration = None
    if options.calibrate is not None:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
        data = recipe.make_data() or module
        calibration = CalibrationRun(recipe.make_trainer(**ALONE), module, data, options.calibrate)
    with progress(len(plan.swapped)) as advance:
        converted = to_phantom({**_hyper_parameters(module), **checkpoint}, plan, folder, calibration, advance)
        how = config.plan, config.mixing, config.latents
        return *converted, _use(config.num_blocks, config.phantom_width, *how)


def _phantom_config(options: argparse.Namespace, recipe: Recipe) -> PhantomConfig:
    """What the command line asks for, and for the rest the strategy of the config."""
    names = ("num_blocks", "phantom_width", "plan")
    given = recipe.phantom_arguments(**{name: getattr(options, name) for name in names})
    if "num_blocks" not in given:
        raise PhantomError("--num-blocks is needed: the config's strategy does not say how many blocks.")
    return PhantomConfig(**{name: given[name] for name in (*names, "mixing", "latents") if name in given})


def _hyper_parameters(module: pl.LightningModule) -> dict[str, Any]:
    """What `load_from_checkpoint` needs, as Lightning saves it; for state dicts that come without."""
    if not module.hparams:
        return {}
    name = getattr(module, "_hparams_name", None)
    return {
        **({"hparams_name": name} if name else {}),
        module.CHECKPOINT_HYPER_PARAMS_KEY: dict(module.hparams),
    }


def _use(
    num_blocks: int,
    phantom_width: int | float,
    plan: Mapping[str, str] | None,
    mixing: str = "pairwise",
    latents: str = "own",
) -> str:
    """How to go on with a phantom checkpoint."""
    named = f", plan={dict(plan)}" if plan is not None else ""
    named += f", mixing={mixing!r}" if mixing != "pairwise" else ""
    named += f", latents={latents!r}" if latents != "own" else ""
    return (
        f"Take it with PhantomStrategy(num_blocks={num_blocks}, phantom_width={phantom_width}{named}), as ckpt_path= "
        f"of fit or validate."
    )
