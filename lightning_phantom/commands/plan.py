"""The command `lightning-phantom plan`: what would be swapped, and what it would cost against DDP and TP."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_phantom.commands.compare.methods import cannot_divide
from lightning_phantom.commands.compare.smaller import smaller_argument
from lightning_phantom.commands.plan_tables import cost_table, simulation_table, sweep_table, verdict
from lightning_phantom.commands.recipe import Recipe
from lightning_phantom.commands.terminal import add_config, command_parser, output_file, phantom_width, show
from lightning_phantom.config import PhantomConfig, TensorParallelConfig
from lightning_phantom.cost.count import ELEMENT_BYTES
from lightning_phantom.cost.data_parallel import NOTHING, Dense, Divided
from lightning_phantom.cost.layer import Layer
from lightning_phantom.cost.machine import Machine
from lightning_phantom.cost.scale import Setting
from lightning_phantom.errors import PhantomError
from lightning_phantom.measure.machine import measure_here
from lightning_phantom.measure.simulate import simulate
from lightning_phantom.plan.finder import plan_phantom, plan_tensor_parallel
from lightning_phantom.plan.record import Plan
from lightning_phantom.swap import nothing_qualifies

DESCRIPTION = """\
Show what phantom parallelism would do to a model, and what a training step would cost on so many ranks by every method
that `compare` runs: DDP and FSDP of the dense model, tensor parallelism (TP), phantom, DDP of a smaller dense model.
Makes the module of the config, no data and no Trainer; trains nothing.

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
    recipe = Recipe(options.config, overrides, "lightning-phantom plan")
    config, num_ranks = request(options, recipe)
    plan = plan_phantom(module := recipe.make_module(), config)
    if not plan.swapped:
        raise nothing_qualifies(module, plan)
    smaller = Recipe(options.smaller, overrides, "lightning-phantom plan") if options.smaller else None
    model, others = divided(module, plan), by_other_methods(recipe, module, config, num_ranks, smaller)
    machine, origin = _machine(options, num_ranks)
    kind = (options.tokens, options.dtype, machine)
    setting = Setting(model.layers, config.phantom_width, *kind, model.rest, **others)
    here = setting.scale(config.num_blocks, num_ranks)
    setting = replace(setting, smaller=None)  # it is as small as phantom at this p alone
    same_ranks, one_block = setting.sweep(num_ranks), setting.sweep()
    result: dict[str, Any] = {
        "config": {"num_blocks": config.num_blocks, "phantom_width": config.phantom_width, "num_ranks": num_ranks}
        | {"mixing": config.mixing, "latents": config.latents}
        | {"tokens": options.tokens, "dtype": options.dtype},
        "machine": asdict(machine),
        "machine_origin": origin,
        "here": here.as_dict(),
        "left_out": dict(setting.left_out),
        "sweep_same_ranks": [row.as_dict() for row in same_ranks],
        "sweep_one_block_a_rank": [row.as_dict() for row in one_block],
    }
    print(plan)
    show(cost_table(here, origin), sweep_table(same_ranks, one_block, here))
    for method, why in setting.left_out.items():
        print(f"Left out: {method}: {why}")
    print(verdict(same_ranks, one_block, here, setting))
    if options.simulate_ranks is not None:
        ranks = options.simulate_ranks
        blocks, tokens = options.num_blocks or ranks, -(-options.tokens // ranks) * ranks
        wide = replace(setting, tokens=tokens, rest=NOTHING, exact=None, beside=False).scale(blocks, ranks)
        shares = [setting.at(layer, blocks) for layer in setting.layers]
        measured = simulate(shares, blocks, ranks, tokens, options.dtype)
        show(simulation_table(wide, measured))
        result["simulation"] = wide.as_dict() | {"measured": {m: asdict(one) for m, one in measured.items()}}
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", DESCRIPTION, EPILOG)
    add = parser.add_argument
    add_config(parser)
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


def divided(module: nn.Module, plan: Plan) -> Divided:
    """A module as the cost model sees it where a plan is carried out."""
    held = sum(p.numel() for p in module.parameters() if not is_lazy(p))
    first = next((name for name, _ in module.named_parameters()), "").rpartition(".")[0]
    linears = tuple(
        Layer(one.in_features, one.out_features, one.bias, needs_input_grad=one.name != first)
        for one in plan.layers
        if not one.swapped
    )
    rest = Dense(linears, max(0, held - sum(one.weights_before for one in plan.layers)))
    # What no parameter comes before reads the data, which need no gradient.
    reads_data = {name for ffn in plan.ffns for group in ffn.groups if first in group.names for name in group.names}
    names = [name for ffn in plan.ffns for group in ffn.groups for name in group.names]
    layers = zip(names, plan.cost_layers(), strict=True)
    return Divided(tuple(replace(one, needs_input_grad=name not in reads_data) for name, one in layers), rest)


def by_other_methods(
    recipe: Recipe, module: nn.Module, config: PhantomConfig, num_ranks: int, smaller: Recipe | None = None
) -> dict[str, Any]:
    """What a `Setting` is to know of the methods that do not divide the model as phantom does.

    Args:
        recipe: the config.
        module: the model made from it.
        config: what phantom would make of it.
        num_ranks: R.
        smaller: the smaller dense model's config; None: the same, narrower.
    """
    small, left_out = None, cannot_divide(module, num_ranks)
    exact = plan_tensor_parallel(module, TensorParallelConfig(num_ranks))
    try:
        narrower = {} if smaller else dict([smaller_argument(recipe, config)])
        small = (smaller or recipe).make_module(**narrower)
    except PhantomError as error:
        left_out["smaller"] = str(error)
    return {
        "exact": divided(module, exact),
        "smaller": None if small is None else divided(small, plan_phantom(small, PhantomConfig(2))).dense,
        "left_out": left_out,
    }


def _machine(options: argparse.Namespace, num_ranks: int) -> tuple[Machine, dict[str, str]]:
    """The machine, and where each of its numbers is from."""
    given = {"flops_per_s": options.flops, "latency_s": options.latency}
    given["link_bytes_per_s"] = None if options.bandwidth is None else options.bandwidth * 1e9
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) == 3:
        # The rates of another machine: what cannot be given is left out, not taken from this one.
        return Machine(memory_bytes_per_s=float("inf"), op_s=0.0, **given), dict.fromkeys(given, "given")
    machine = measure_here(num_ranks, options.dtype)
    if options.bandwidth is not None:  # of every kind of collective
        machine = replace(machine, all_reduce_bytes_per_s=None, reduce_scatter_bytes_per_s=None)
    origin = dict.fromkeys(asdict(machine), "measured here") | dict.fromkeys(given, "given")
    return replace(machine, **given), origin
