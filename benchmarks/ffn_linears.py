"""Which linears of a model are feed-forward, by what they are called and by their sizes. It asks no finder."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

# What the authors of models call feed-forward networks and their linears.
CALLED = re.compile(
    r"mlp|ffn?\d*$|ff_|ffn|feed_?forward|feedforward|^fc_?\d|intermediate|^w[io](_\d)?$|^lin\d|^linear_?\d|^w[0-3]$|^c_fc$|"
    r"(gate|up|down)_proj|dense_h_to_4h|densereludense|expert|_dense$|glu$|^output\w*$|pwconv",
    re.IGNORECASE,
)
ATTENTION = re.compile(r"attn\d*$|attention\d*$|attentionlayer$", re.IGNORECASE)
OTHER = re.compile(
    r"(lm_head|head|heads|classifier|router|pooler|embed\w*|position\w*|logit\w*|predict\w*)$", re.IGNORECASE
)


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """The widths of an nn.Linear or a Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def ffn_linears(model: nn.Module) -> list[str]:
    """The linears that are called feed-forward and have a partner in their block: d -> h or d -> 2h, and h -> d."""
    modules = dict(model.named_modules())
    sizes = {
        name: size
        for name, module in modules.items()
        if (size := sizes_of(module)) and not plays_another_part(name, modules)
    }
    return [
        name
        for name in sizes
        if any(is_called_ffn(*each) for each in owners(name, modules)[:3]) and has_partner(name, sizes, modules)
    ]


def owners(name: str, modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """A linear and the modules around it, up to the layer of a stack: what each is called."""
    found = []
    while name:
        name, _, called = name.rpartition(".")
        module = modules[f"{name}.{called}" if name else called]
        found.append((called, module))
        if called.isdigit() and isinstance(modules[name], nn.ModuleList):
            break
    return found


def plays_another_part(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether it is in an attention, or a head itself."""
    around = owners(name, modules)
    names = [each for called, module in around for each in (called, type(module).__name__)]
    return any(map(ATTENTION.search, names)) or bool(OTHER.match(around[0][0]))


def is_called_ffn(called: str, module: nn.Module) -> bool:
    return bool(
        CALLED.search(called) or re.search(r"MLP|FFN|FeedForward|Intermediate|Mlp|Expert", type(module).__name__)
    )


def has_partner(name: str, sizes: dict[str, tuple[int, int]], modules: dict[str, nn.Module]) -> bool:
    """Whether the innermost module around it that holds other linears holds one that leads back."""
    into, out = sizes[name]
    back = {(out, into), (out, 2 * into)} | ({(out // 2, into)} if out % 2 == 0 else set())
    return any(sizes[other] in back for other in neighbours(name, sizes, modules))


def neighbours(name: str, sizes: dict[str, tuple[int, int]], modules: dict[str, nn.Module]) -> Iterator[str]:
    """The other linears of the block, up to the layer of a stack."""
    top = name
    while top and not (top.rpartition(".")[2].isdigit() and isinstance(modules[top.rpartition(".")[0]], nn.ModuleList)):
        top = top.rpartition(".")[0]
    start = f"{top}." if top else ""
    for other in sizes:
        if other != name and other.startswith(start):
            inside = other[len(start) :].split(".")[:-1]
            if not any(part.isdigit() for part in inside) or top == "":
                yield other
