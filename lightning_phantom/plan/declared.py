"""What a model's own tensor parallel plan says: the words that Hugging Face's models ship for their linears.

Such a plan tells for which layouts the model's authors made its forward. It is used where a forward cannot be traced,
for feed-forward blocks alone; what tracing finds out counts for more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lightning_phantom.layers.dense import features, is_linear
from lightning_phantom.plan.proof import Traces
from lightning_phantom.plan.record import ProvenChain, join

_LAYOUTS = {"colwise": ("replicated", "sharded"), "rowwise": ("sharded", "replicated")}
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


def declared_words(root: nn.Module, linears: Collection[str]) -> dict[str, str]:
    """The word that the plans of the models below `root` have for each of `linears`, where they have one."""
    words: dict[str, str] = {}
    for name, model in root.named_modules():
        base = getattr(model, "base_model_prefix", None)
        if isinstance(base, str):
            inner = join(name, base if isinstance(getattr(model, base, None), nn.Module) else "")
            config: Any = getattr(model, "config", None)
            words.update(_prefixed(inner, getattr(config, "base_model_tp_plan", None)))
            words.update(_prefixed(name, getattr(model, "_tp_plan", None)))
    # A * in such a plan stands for the number of a layer.
    return {name: words[key] for name in linears if (key := _numberless(name)) in words}


def _prefixed(prefix: str, plan: Any) -> dict[str, str]:
    return {_numberless(join(prefix, key)): word for key, word in plan.items()} if isinstance(plan, Mapping) else {}


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def declared_chains(
    root: nn.Module, words: Mapping[str, str], available: Collection[str], traces: Traces
) -> list[ProvenChain]:
    """The feed-forward blocks whose forward cannot be traced, but whose linears are all declared colwise or rowwise.

    A block that draws masks, or has parameters beside its linears, computes something else on shards whatever its plan
    says: it is left out.
    """
    chains = []
    for owner in traces.untraceable:
        block = root.get_submodule(owner)
        inside = {join(owner, name): m for name, m in block.named_modules() if name}
        members = {name: m for name, m in inside.items() if is_linear(m)}
        layouts = {name: _LAYOUTS[words[name]] for name in members if words.get(name) in _LAYOUTS}
        own = {id(p) for m in members.values() for p in m.parameters()}
        others = [t for t in (*block.parameters(), *block.buffers()) if id(t) not in own]
        masks = [m for m in inside.values() if isinstance(m, _DropoutNd)]
        if not _FEED_FORWARD.search(owner.rpartition(".")[2]) or others or masks:
            continue
        if set(layouts) != set(members) or not set(members) <= set(available):
            continue
        widths = {features(m)[words[name] == "colwise"] for name, m in members.items()}
        if len(widths) == 1 and {words[name] for name in members} == set(_LAYOUTS):
            entries = {name: layout == ("replicated", "sharded") for name, layout in layouts.items()}
            flows = tuple((name, None, 0) if entry else (name, 0, None) for name, entry in entries.items())
            chains.append(ProvenChain(owner, flows))
    return chains


def left_exact(word: str, why: str | None) -> str:
    """Why a linear that the model's own plan names stays dense; `why` is what speaks against a chain, if known."""
    known = "" if word in _LAYOUTS else ", a word that is not used here"
    return f"left exact ({word!r} in the model's own TP plan{known})" + (f": {why}" if why else "")
