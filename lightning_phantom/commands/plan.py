"""The command `lightning-phantom plan`: what would be swapped, and what it would cost against DDP and TP."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_phantom.commands.plan_tables import cost_table, simulation_table, sweep_table, verdict
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import command_parser, output_file, phantom_width, show
from lightning_phantom.config import PhantomConfig
from lightning_phantom.cost.count import ELEMENT_BYTES
from lightning_phantom.cost.data_parallel import NOTHING, Rest
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.predict import Machine
from lightning_phantom.cost.scale import Setting
from lightning_phantom.errors import PhantomError
from lightning_phantom.measure.machine import measure_here
from lightning_phantom.measure.simulate import simulate
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.plan.record import Plan
from lightning_phantom.swap import nothing_qualifies

DESCRIPTION = """\
Show what phantom parallelism would do to a model, and what a training step would cost on so many ranks, against DDP of
the dense model and against tensor parallelism (TP). Makes the module of the config, no data and no Trainer; trains
nothing.

Weights, FLOPs of linears, bytes and calls are counted, exactly. Times are predicted from this machine's own rates,
which are measured first (about half a minute) unless --flops, --bandwidth and --latency give those of another."""
EPILOG = """\
Anything else overrides the config, as for `fit`: --model.width 4096.

  lightning-phantom plan --config run.yaml
  lightning-phantom plan --config run.yaml --num-blocks 64 --ranks 64 --tokens 8192 --dtype bfloat16 \\
      --flops 2e14 --bandwidth 25 --latency 2e-5
"""


def main(args: Sequence[str]) -> None:
    """Run the command with these arguments."""
    options, overrides = _parser().parse_known_args(args)
    _check(options)
    target = output_file("--json", options.json)
    recipe = Recipe(
        [*(() if options.config is None else ("--config", options.config)), *overrides], "lightning-phantom plan"
    )
    config, num_ranks = request(options, recipe)
    plan = plan_phantom(module := recipe.make_module(), config)
    if not plan.swapped:
        raise nothing_qualifies(module, plan)
    layers, rest = tuple(plan.cost_layers()), rest_of(module, plan)
    machine, origin = _machine(options, num_ranks)
    setting = Setting(layers, config.phantom_width, options.tokens, options.dtype, machine, rest)
    here = setting.scale(config.num_blocks, num_ranks)
    same_ranks, one_block = setting.sweep(num_ranks), setting.sweep()
    result: dict[str, Any] = {
        "config": {"num_blocks": config.num_blocks, "phantom_width": config.phantom_width, "num_ranks": num_ranks}
        | {"mixing": config.mixing, "latents": config.latents}
        | {"tokens": options.tokens, "dtype": options.dtype},
        "machine": asdict(machine),
        "machine_origin": origin,
        "here": here.as_dict(),
        "sweep_same_ranks": [row.as_dict() for row in same_ranks],
        "sweep_one_block_a_rank": [row.as_dict() for row in one_block],
    }
    print(plan)
    show(cost_table(here, origin), sweep_table(same_ranks, one_block, here))
    print(verdict(same_ranks, one_block, num_ranks))
    if options.simulate_ranks is not None:
        ranks = options.simulate_ranks
        blocks, tokens = options.num_blocks or ranks, -(-options.tokens // ranks) * ranks
        wide = replace(setting, tokens=tokens, rest=NOTHING).scale(blocks, ranks)
        shares = [setting.at(layer, blocks) for layer in layers]
        measured = simulate(shares, blocks, ranks, tokens, options.dtype)
        show(simulation_table(wide, measured))
        result["simulation"] = wide.as_dict() | {"measured": {m: asdict(one) for m, one in measured.items()}}
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the config of the run, as for `fit`")
    add("--num-blocks", type=int, metavar="P", help="number of blocks p (default: the config's, else the ranks')")
    add(
        "--phantom-width",
        type=phantom_width,
        metavar="K",
        help="k, or a fraction of the block width like 0.25 (default: the config's, else 0.25)",
    )
    add("--ranks", type=int, metavar="R", help="ranks that hold the model between them (default: the config's devices)")
    add(
        "--tokens",
        type=int,
        default=1024,
        metavar="B",
        help="rows of a step, all ranks together: batch size times sequence length (default: 1024)",
    )
    add("--dtype", choices=list(ELEMENT_BYTES), default="float32", help="type of the activations (default: float32)")
    add("--flops", type=float, metavar="RATE", help="FLOP/s of one rank in large products (default: measured)")
    add("--bandwidth", type=float, metavar="GB/s", help="what one rank sends, in GB/s (default: measured)")
    add("--latency", type=float, metavar="S", help="seconds of a collective that sends nothing (default: measured)")
    add(
        "--simulate-ranks",
        type=int,
        metavar="R",
        help="also run one rank's real share of the work among R ranks, without the others; p = R, or --num-blocks",
    )
    add("--json", metavar="FILE", help="write all numbers there")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("flops", "bandwidth", "latency", "tokens", "ranks", "simulate_ranks", "num_blocks"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise PhantomError(f"--{name.replace('_', '-')} {value}: needs a number above 0.")
    blocks, simulated = options.num_blocks, options.simulate_ranks
    if simulated is not None and (blocks or simulated) < 2:
        raise PhantomError(f"--simulate-ranks {simulated}: needs at least 2, or --num-blocks.")
    if blocks and simulated and blocks % simulated:
        raise PhantomError(f"--simulate-ranks {simulated} does not divide --num-blocks {blocks}; leave one out.")


def request(options: argparse.Namespace, recipe: Recipe) -> tuple[PhantomConfig, int]:
    """What to plan, and for how many ranks: from the options, else from the config's Trainer and strategy."""
    given = recipe.phantom_arguments(num_blocks=options.num_blocks, phantom_width=options.phantom_width)
    ranks, blocks = options.ranks, given.get("num_blocks")
    if ranks is None:
        ranks = recipe.config_ranks()
    if ranks is None:
        ranks = blocks or 2
    blocks = blocks or ranks
    if blocks < 2:
        raise PhantomError("one rank and no number of blocks: give --num-blocks or --ranks, say --num-blocks 4.")
    if blocks % ranks:
        raise PhantomError(f"--ranks {ranks} does not divide num_blocks={blocks}; give --num-blocks or other --ranks.")
    names = ("phantom_width", "plan", "init", "mixing", "latents")
    settings = {name: given[name] for name in names if name in given}
    return PhantomConfig(blocks, **settings), ranks


def rest_of(module: nn.Module, plan: Plan) -> Rest:
    """What the module has beside the linears to be swapped."""
    linears = tuple(Layer(one.in_features, one.out_features, one.bias) for one in plan.layers if not one.swapped)
    held = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    return Rest(linears, max(0, held - sum(one.weights_before for one in plan.layers)))


def _machine(options: argparse.Namespace, num_ranks: int) -> tuple[Machine, dict[str, str]]:
    """The machine, and where each of its numbers is from."""
    given = {"flops_per_s": options.flops, "latency_s": options.latency}
    given["link_bytes_per_s"] = None if options.bandwidth is None else options.bandwidth * 1e9
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) == 3:
        # The rates of another machine: what cannot be given is left out, not taken from this one.
        return Machine(memory_bytes_per_s=float("inf"), op_s=0.0, **given), dict.fromkeys(given, "given")
    machine = measure_here(num_ranks, options.dtype)
    origin = dict.fromkeys(asdict(machine), "measured here") | dict.fromkeys(given, "given")
    return replace(machine, **given), origin
