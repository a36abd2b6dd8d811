"""What `lightning-phantom compare` is asked for, checked before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import add_config, command_parser, output_file, phantom_width
from lightning_phantom.cost.methods import METHODS
from lightning_phantom.errors import PhantomError

OTHERS = ("fsdp", "tensor_parallel_torch", "smaller")  # not every model can be trained so
LEAST_WARMUP = 2  # the strategies compare their ranks in a fit's first two batches, which no later step pays for

DESCRIPTION = """\
Train the module of a config, on its data, by several methods on the same ranks, and show what each took. The methods
run in turn, round after round, so that what else the machine does falls on all of them.

  ddp                        the dense model on every rank, gradients averaged (DistributedDataParallel)
  fsdp                       the same, every rank holding a share of the weights (fully_shard)
  tensor_parallel            in Megatron's pairs of column and row (TensorParallelStrategy)
  tensor_parallel_layerwise  the same with collectives at every layer
  tensor_parallel_torch      torch's own parallelize_module, in Megatron's pairs
  phantom                    PhantomStrategy, with the config's settings if it names it
  smaller                    a dense model of as many weights as the phantom one, under DDP: another config (--smaller),
                             or the same with narrower feed-forward networks where the model has an argument for that

Every rank reads its own batches, as under DDP; the ranks of torch's own tensor parallelism read them all. Ratios
are over the fastest of those that train the dense model."""
EPILOG = """\
Anything else overrides the config for all methods, as for `fit`: --model.lr 0.01. The config's callbacks and loggers
are left out. Across hosts, run the same command on each under torchrun instead of lightning-phantom:

  lightning-phantom compare --config run.yaml --ranks 4 --num-blocks 4 --set phantom.model.lr=0.02
  torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
      -m lightning_phantom compare --config run.yaml
"""


@dataclass(frozen=True)
class Request:
    """A comparison that somebody asks for.

    Attributes:
        config: paths of the config's files, later ones over earlier ones.
        smaller: the same of the smaller dense model; none: made from `config`.
        methods: what to compare, out of `METHODS`.
        ranks: R, where the command starts the ranks itself.
        rounds: fits of each method.
        steps: timed steps of a fit.
        warmup: steps before them.
        train_steps: steps of the first fit of each method, which gives the losses; None: warmup + steps.
        validate_every: steps between validations in that fit; None: once, at its end.
        monitor: the metric that is the validation loss.
        target_loss: the loss to reach, if any.
        tokens_per_sample: to give tokens per second.
        num_blocks: p; None: the config's, else R.
        phantom_width: k; None: the config's.
        overrides: `(method, argument)` of `--set`.
        arguments: overrides for all methods.
        json: where the numbers go.
        plot: where the picture goes.
    """

    config: tuple[str, ...]
    smaller: tuple[str, ...]
    methods: tuple[str, ...]
    ranks: int
    rounds: int
    steps: int
    warmup: int
    train_steps: int | None
    validate_every: int | None
    monitor: str
    target_loss: float | None
    tokens_per_sample: float | None
    num_blocks: int | None
    phantom_width: int | float | None
    overrides: tuple[tuple[str, str], ...]
    arguments: tuple[str, ...]
    json: Path | None
    plot: Path | None

    def recipe(self, method: str, *arguments: str) -> Recipe:
        """The config as one method is to use it, with further arguments."""
        files = self.smaller if method == "smaller" and self.smaller else self.config
        own = [f"--{argument}" for argument in arguments]
        own += [f"--{argument}" for name, argument in self.overrides if name == method]
        return Recipe(files, [*self.arguments, *own], f"lightning-phantom compare, {method}")

    def tuned(self, method: str) -> bool:
        """Whether the method was given a learning rate of its own."""
        return any(
            name == method and argument.partition("=")[0].rpartition(".")[2] in ("lr", "learning_rate")
            for name, argument in self.overrides
        )


def parse(args: Sequence[str]) -> Request:
    """Read the command line.

    Raises:
        PhantomError: an option makes no sense.
    """
    given, rest = _parser().parse_known_args(args)
    methods = tuple(dict.fromkeys(name.strip() for name in given.methods.split(",")))
    given.config, given.smaller = tuple(given.config), tuple(given.smaller)
    if given.smaller and "smaller" not in methods:
        methods = (*methods, "smaller")
    for name in methods:
        if name not in METHODS:
            raise PhantomError(f"--methods {name!r}: choose from {', '.join(METHODS)}, separated by commas.")
    for path in (*given.config, *given.smaller):
        if not Path(path).is_file():
            raise PhantomError(f"{path} is no file; --config and --smaller take the YAML of a run.")
    for name, least in (("ranks", 1), ("rounds", 1), ("steps", 1), ("warmup", LEAST_WARMUP), ("train_steps", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise PhantomError(f"--{name.replace('_', '-')} {value}: needs at least {least}.")
    if given.train_steps is not None and given.train_steps <= given.warmup:
        raise PhantomError(f"--train-steps {given.train_steps}: needs more steps than --warmup {given.warmup}.")
    if given.validate_every is not None and given.validate_every < 1:
        raise PhantomError(f"--validate-every {given.validate_every}: needs at least 1.")
    given.overrides = tuple(_override(text, methods) for text in given.set)
    given.methods, given.arguments = methods, tuple(rest)
    given.json, given.plot = output_file("--json", given.json), output_file("--plot", given.plot)
    if given.plot is not None:
        _check_plot(given.plot)
    del given.set
    return Request(**vars(given))


def _override(text: str, methods: Sequence[str]) -> tuple[str, str]:
    method, dot, argument = text.partition(".")
    if method not in methods or not dot or "=" not in argument:
        raise PhantomError(
            f"--set {text}: needs METHOD.KEY=VALUE with a method of this comparison ({', '.join(methods)}) and "
            f"a key of the config, like --set phantom.model.lr=0.02."
        )
    return method, argument


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise PhantomError(f"--plot {path}: needs a name that ends in .png, .svg or .pdf.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PhantomError("--plot needs matplotlib: pip install 'lightning-phantom[plot]'.") from None


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add_config(parser, required=True)
    add(
        "--methods",
        default=",".join(METHODS),
        metavar="LIST",
        help="what to compare, separated by commas (default: %(default)s)",
    )
    add(
        "--ranks", type=int, default=2, metavar="R", help="ranks to start here (default: 2); torchrun's, under torchrun"
    )
    add("--rounds", type=int, default=3, metavar="N", help="fits of each method (default: 3)")
    add("--steps", type=int, default=20, metavar="N", help="timed steps of a fit (default: 20)")
    add("--warmup", type=int, default=5, metavar="N", help="steps before them, at least 2 (default: 5)")
    add(
        "--train-steps",
        type=int,
        metavar="N",
        help="steps of each method's first fit, which gives the losses (default: warmup + steps)",
    )
    add("--validate-every", type=int, metavar="N", help="steps between validations in it (default: once, at its end)")
    add(
        "--monitor",
        default="val_loss",
        metavar="NAME",
        help="the metric that is the validation loss (default: val_loss)",
    )
    add("--target-loss", type=float, metavar="LOSS", help="also show steps, time and energy to this validation loss")
    add("--tokens-per-sample", type=float, metavar="N", help="also show tokens per second")
    add("--num-blocks", type=int, metavar="P", help="number of blocks p (default: the config's, else the ranks)")
    add("--phantom-width", type=phantom_width, metavar="K", help="k, or a fraction of the block width like 0.25")
    add(
        "--set",
        action="append",
        default=[],
        metavar="METHOD.KEY=VALUE",
        help="override the config for one method, like phantom.model.lr=0.02; can be repeated",
    )
    add("--json", metavar="FILE", help="write all numbers there")
    add("--plot", metavar="FILE", help="draw them there (.png, .svg, .pdf); needs matplotlib")
    return parser
