"""Finds feed-forward networks (FFNs): which linears belong to one, in which order, and which read the same value.

It proves nothing and need not: a layer computes the same wherever it stands, and what is guessed wrong costs an
exchange (`layers.activation`). Four ways to know, the first that knows counts: the user's plan, a model's own tensor
parallel plan, a trace of a module's forward, and how linears are registered.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_phantom.layers.dense import features, is_linear
from lightning_phantom.plan.trace import Flow, flows_of

_FEED_FORWARD = re.compile(
    r"mlp|ffn|ff\b|feed_?forward|dense_h_to_4h|dense_4h_to_h|intermediate|fc[12_]", re.IGNORECASE
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class Group(NamedTuple):
    """Linears of one FFN that read the same value.

    Attributes:
        names: full names of the modules; the first computes for all.
        depth: how many linears lie before them, on the longest way.
        enters: whether the value is whole tokens: it comes from outside the FFN, or out of a norm in it.
        leaves: whether something outside reads what they write.
        exits: whether what they write goes back to whole tokens: it leaves, or a norm in the FFN reads it.
        in_pairs: `enters` and `exits` in Megatron's pairs, where those of odd depth write whole tokens.
    """

    names: tuple[str, ...]
    depth: int
    enters: bool
    leaves: bool
    exits: bool
    in_pairs: tuple[bool, bool]


class FFN(NamedTuple):
    """A feed-forward network in a module.

    Attributes:
        block: full name of the module in which it lies.
        groups: its linears, in the order of the forward.
        known_by: how it was found, in words.
    """

    block: str
    groups: tuple[Group, ...]
    known_by: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its linears."""
        return tuple(name for group in self.groups for name in group.names)


def below_attention(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The attention that each of `names` lies below, for those that do."""
    found = {}
    for name in names:
        parts = name.split(".")
        for n in range(1, len(parts)):
            owner = ".".join(parts[:n])
            module = root.get_submodule(owner)
            ffn_inside = any(_FEED_FORWARD.search(part) for part in parts[n:-1])
            is_attention = _ATTENTION.search(parts[n - 1]) or _ATTENTION.search(type(module).__name__)
            if is_attention and not ffn_inside and _holds_attention_alone(parts, n, type(module).__name__):
                found[name] = owner
                break
    return found


def _holds_attention_alone(parts: list[str], n: int, kind: str) -> bool:
    """Whether what lies below is the attention itself; `AttentionBlock` and the like hold an FFN, too."""
    return not re.search(r"block|layer$|encoder|decoder|model|stack", kind, re.IGNORECASE) or bool(
        re.fullmatch(r"(self_|cross_)?(attn|attention)|.*_(attn|attention)", parts[n - 1], re.IGNORECASE)
    )


def find_ffns(root: nn.Module, available: Collection[str]) -> list[FFN]:
    """The FFNs among the linears `available`, in the order of their first linear."""
    found: list[FFN] = []
    left = dict.fromkeys(available)
    for find in (_declared, _traced, _registered):
        for ffn in find(root, left):
            found.append(ffn)
            for name in ffn.names:
                left.pop(name, None)
    order = {name: n for n, name in enumerate(available)}
    return sorted(found, key=lambda ffn: min(order[name] for name in ffn.names))


# A model's own plan


def _declared(root: nn.Module, left: Mapping[str, Any]) -> Iterable[FFN]:
    """FFNs that a Hugging Face model's own TP plan names: column-wise linears, and the row-wise one after them."""
    words = declared_words(root, left)
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in left:
        if name in words and words[name] in ("colwise", "rowwise"):
            blocks[name.rpartition(".")[0]].append(name)
    for block, names in blocks.items():
        columns = tuple(name for name in names if words[name] == "colwise")
        rows = tuple(name for name in names if words[name] == "rowwise")
        if len(rows) == 1 and columns and _match(root, columns, rows[0]):
            yield _pair(block, columns, rows[0], "the model's own TP plan")


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
    return {name: words[key] for name in linears if (key := _numberless(name)) in words} if words else {}


def _prefixed(prefix: str, plan: Any) -> dict[str, str]:
    return {_numberless(join(prefix, key)): word for key, word in plan.items()} if isinstance(plan, Mapping) else {}


def _numberless(name: str) -> str:
    """`name` with a * for the number of a layer, as such plans have it."""
    return re.sub(r"\d+", "*", name)


# A trace


def _traced(root: nn.Module, left: Mapping[str, Any]) -> Iterable[FFN]:
    """FFNs in the forwards that torch.fx can trace, from the outermost module inwards."""
    known: dict[str, list[FFN]] = {}  # modules that look the same flow the same

    def search(owner: str, module: nn.Module) -> Iterable[FFN]:
        inside = [name for name in left if _is_below(owner, name)]
        if len(inside) < 2 or (not owner and any("." not in name for name in inside) and is_linear(module)):
            return
        key = f"{type(module).__module__} {module!r} {[name[len(owner) :] for name in inside]}"
        if key not in known:
            flows = flows_of(module, {name[len(owner) + bool(owner) :] for name in inside})
            known[key] = _ffns_of(flows) if flows is not None else []
        used: set[str] = set()
        for ffn in known[key]:
            groups = tuple(g._replace(names=tuple(join(owner, n) for n in g.names)) for g in ffn.groups)
            names = [name for g in groups for name in g.names]
            used.update(names)
            yield FFN(_common(names), groups, "traced")
        for name, child in module.named_children():
            below = join(owner, name)
            if sum(_is_below(below, n) for n in left if n not in used) > 1:
                yield from (f for f in search(below, child) if not used & set(f.names))

    taken: set[str] = set()
    for ffn in search("", root):
        if not taken & set(ffn.names):
            taken.update(ffn.names)
            yield ffn


def _ffns_of(flows: list[Flow]) -> list[FFN]:
    """Join the linears that hand values to each other; alone ones are no FFN."""
    parts: list[set[str]] = []
    for flow in flows:
        linked = {flow.name, *flow.sources}
        touching = [part for part in parts if part & linked]
        parts = [part for part in parts if not part & linked] + [linked.union(*touching)]
    found = []
    for part in parts:
        if len(part) < 2:
            continue
        groups: dict[object, list[Flow]] = defaultdict(list)
        for flow in (f for f in flows if f.name in part):
            groups[flow.reads].append(flow)
        found.append(
            FFN(
                "",
                tuple(
                    Group(
                        tuple(dict.fromkeys(f.name for f in group)),
                        group[0].depth,
                        group[0].enters,
                        any(f.leaves for f in group),
                        any(f.exits for f in group),
                        (group[0].in_pairs[0], any(f.in_pairs[1] for f in group)),
                    )
                    for group in groups.values()
                ),
                "traced",
            )
        )
    return found


# How linears are registered


def _registered(root: nn.Module, left: Mapping[str, Any]) -> Iterable[FFN]:
    """D -> h and h -> d (gated: d -> h twice), registered one after the other, nothing linear between."""
    names = [name for name, module in root.named_modules() if is_linear(module)]
    n = 0
    while n < len(names):
        for columns in (2, 1):
            run = names[n : n + columns + 1]
            if len(run) == columns + 1 and all(name in left for name in run):
                if _match(root, run[:-1], run[-1]) and _same_block(run):
                    yield _pair(_common(run), tuple(run[:-1]), run[-1], "two linears of one block")
                    n += columns
                    break
        n += 1


def _match(root: nn.Module, columns: Collection[str], row: str) -> bool:
    into, out_of = {features(root.get_submodule(name)) for name in columns}, features(root.get_submodule(row))
    return into == {(out_of[1], out_of[0])}


def _same_block(names: list[str]) -> bool:
    """Whether the linears lie in one block: none of them in another numbered part of the model."""
    rests = [name[len(_common(names)) :].split(".") for name in names]
    return not any(part.isdigit() for rest in rests for part in rest[:-1])


def _pair(block: str, columns: tuple[str, ...], row: str, known_by: str) -> FFN:
    first = Group(columns, 0, True, False, False, (True, False))
    return FFN(block, (first, Group((row,), 1, False, True, True, (False, False))), known_by)


def alone(name: str) -> FFN:
    """An FFN of one linear."""
    return FFN(name.rpartition(".")[0], (Group((name,), 0, True, True, True, (True, True)),), "alone")


def _common(names: Collection[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def join(owner: str, name: str) -> str:
    """The full name of what `owner` calls `name`."""
    return ".".join(part for part in (owner, name) if part)


def _is_below(owner: str, name: str) -> bool:
    return name.startswith(f"{owner}." if owner else "")
