"""Finds feed-forward networks (FFNs): which linears belong to one, in which order, and which read the same value.

It proves nothing and need not: a layer computes the same wherever it stands, and what is guessed wrong costs an
exchange (`layers.activation`). Four ways to know, the first that knows counts: a model's own tensor parallel plan, a
trace of a module's forward, torch's transformer layers, and how linears are registered.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_phantom.layers.dense import features, is_linear
from lightning_phantom.plan.trace import Flow, flows_of


class Group(NamedTuple):
    """Linears of one FFN that read the same value.

    Attributes:
        names: full names of the modules; the first computes for all.
        depth: how many linears lie before them, on the longest way.
        enters: whether the value is whole tokens: it comes from outside the FFN, or out of a norm that needs them.
        leaves: whether something outside reads what they write.
        exits: whether what they write goes back to whole tokens: it leaves, or such a norm in the FFN reads it.
        normed: whether the value comes out of an operation that knows how features lie (`layers.across`).
        norms: the operations of that kind on what they write: how many numbers a token each exchanges.
        parts: 2 where what each writes is a gate and what it gates, side by side.
        after: the linear of the FFN that comes right before them, joined to them by elementwise operations alone; None
            where there is none, or more than one, or where one of them is called more than once.
        gated: whether the value comes out of a gated linear unit, which reads one linear's output.
    """

    names: tuple[str, ...]
    depth: int
    enters: bool
    leaves: bool
    exits: bool
    normed: bool = False
    norms: tuple[int, ...] = ()
    parts: int = 1
    after: str | None = None
    gated: bool = False


class FFN(NamedTuple):
    """A feed-forward network in a module.

    Attributes:
        groups: its linears, in the order of the forward.
        known_by: how it was found, in words.
    """

    groups: tuple[Group, ...]
    known_by: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its linears."""
        return tuple(name for group in self.groups for name in group.names)


def find_ffns(root: nn.Module, available: Collection[str]) -> list[FFN]:
    """The FFNs among the linears `available`, in the order of their first linear."""
    found: list[FFN] = []
    left = dict.fromkeys(available)
    for find in (_declared, _traced, _torchs, _registered):
        for ffn in find(root, left):
            if all(name in left for name in ffn.names):
                found.append(ffn)
                for name in ffn.names:
                    del left[name]
    order = {name: n for n, name in enumerate(available)}
    return sorted(found, key=lambda ffn: min(order[name] for name in ffn.names))


# What is no FFN


def elsewhere(root: nn.Module) -> dict[str, str]:
    """The linears that have another part to play, as a module's name or a model's own method says, and which."""
    attentions = _attentions(root)
    innermost = attentions.keys() - {owner for name in attentions for owner in _owners(name)}
    heads = {id(head) for model in root.modules() if (head := _output_embeddings(model)) is not None}
    adapted = [name for name, module in root.named_modules() if "base_layer" in module._modules]
    found = {}
    for name, module in _linears(root).items():
        if id(module) in heads:
            found[name] = "the model's head: its output embedding"
        elif owner := next((o for o in _owners(name) if o in adapted), None):
            part = "the base weight, which it trains around" if name == f"{owner}.base_layer" else "a part"
            found[name] = f"{part}, of a LoRA or another adapter ({owner!r})"
        elif owner := next((o for o in _owners(name) if _holds_experts(o, root)), None):
            found[name] = (
                "an expert: a rank calls it only if its own tokens lead there, and phantom ranks call together"
            )
        elif owner := next((o for o in _owners(name) if o in innermost), None):
            found[name] = f"part of the attention ({attentions[owner]})"
    return found


def unpaired(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Why each of `names` is in no FFN: linears that are neither elsewhere nor found."""
    attentions = _attentions(root)
    found = {}
    for name in names:
        if owner := next((o for o in _owners(name) if o in attentions), None):
            found[name] = f"part of the attention ({attentions[owner]})"
        else:
            found[name] = "stands alone: no other linear makes an FFN with it"
    return found


def _attentions(root: nn.Module) -> dict[str, str]:
    """The modules that call themselves attention, and how. One may hold another, and an FFN beside that."""
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            for called in (type(module).__name__, name.rpartition(".")[2]):
                if called.rstrip("0123456789").lower().endswith(("attn", "attention")):
                    found.setdefault(name, called)
    return found


def _holds_experts(name: str, root: nn.Module) -> bool:
    """Whether a module is the list of the experts that a router chooses from."""
    listed = isinstance(root.get_submodule(name), nn.ModuleList | nn.ModuleDict)
    return listed and name.rpartition(".")[2].lower().endswith("experts")


def _output_embeddings(model: Any) -> Any:
    """What a Hugging Face model computes the scores of its vocabulary with."""
    try:
        return model.get_output_embeddings()
    except Exception:  # no such method, or one of the user's own
        return None


# A model's own plan


def _declared(root: nn.Module, left: Mapping[str, Any]) -> Iterable[FFN]:
    """FFNs that a Hugging Face model's own TP plan names: column-wise linears, and the row-wise one after them."""
    words = _declared_words(root, left)
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in words:
        blocks[name.rpartition(".")[0]].append(name)
    for names in blocks.values():
        columns = tuple(name for name in names if words[name] == "colwise")
        rows = [name for name in names if words[name] == "rowwise"]
        if len(rows) == 1 and _match(root, columns, rows[0]):
            yield _pair(columns, rows[0], "the model's own TP plan names it")


def _declared_words(root: nn.Module, linears: Collection[str]) -> dict[str, str]:
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


def _traced(root: nn.Module, left: Mapping[str, Any]) -> Iterator[FFN]:
    """FFNs in the forwards that torch.fx can trace, from the outermost module inwards."""
    known: dict[object, list[Flow]] = {}  # modules that look the same flow the same
    others = elsewhere(root)

    def search(owner: str, module: nn.Module, inside: list[str]) -> Iterator[FFN]:
        if len(inside) < 2 or not any(name in left for name in inside):
            return
        start = len(owner) + bool(owner)
        linears = tuple(name[start:] for name in inside)
        key = type(module).__module__, repr(module), linears
        if key not in known:
            known[key] = flows_of(module, linears) or []
        for groups in _connected(known[key], {name[start:] for name in inside if name in left}):
            whole = (
                group._replace(
                    names=tuple(join(owner, name) for name in group.names),
                    after=group.after and join(owner, group.after),
                )
                for group in groups
            )
            yield FFN(tuple(whole), "a trace connects its linears")
        for name, child in module.named_children():
            below = join(owner, name)
            yield from search(below, child, [each for each in inside if each.startswith(f"{below}.")])

    yield from search("", root, [name for name in _linears(root) if name in left or name not in others])


def _connected(flows: list[Flow], wanted: set[str]) -> Iterator[tuple[Group, ...]]:
    """The linears of `wanted` that hand values to each other, or stand between two linears that stay dense."""
    parts: list[set[str]] = []
    calls: dict[str, Flow] = {}
    for flow in flows:
        calls.setdefault(flow.name, flow)
    called = Counter(flow.name for flow in flows)
    flows = list(calls.values())  # the first of each linear
    for flow in (f for f in flows if f.name in wanted):
        linked = {flow.name, *flow.sources} & wanted
        touching = [part for part in parts if part & linked]
        parts = [part for part in parts if not part & linked] + [linked.union(*touching)]
    for part in parts:
        depth: dict[str, int] = {}
        groups: dict[object, list[Flow]] = defaultdict(list)
        for flow in (f for f in flows if f.name in part):
            depth[flow.name] = max((depth.get(s, -1) + 1 for s in flow.sources), default=0)
            groups[flow.reads].append(flow)
        read_outside = {source for flow in flows if flow.name not in part for source in flow.sources}
        has_linears_around = bool(part & read_outside) and any(f.sources for f in flows if f.name in part)
        if len(part) > 1 or has_linears_around:
            joined = []
            for group in groups.values():
                leaves = any(flow.leaves or flow.name in read_outside for flow in group)
                joined.append(
                    Group(
                        tuple(flow.name for flow in group),
                        depth[group[0].name],
                        enters=group[0].enters or not set(group[0].sources) & part,
                        leaves=leaves,
                        exits=any(flow.exits or flow.name in read_outside for flow in group),
                        gated=group[0].gated,
                        normed=group[0].normed,
                        norms=tuple(numbers for flow in group for numbers in flow.norms),
                        parts=min(flow.parts for flow in group),
                        after=_right_before(group, part, depth, called),
                    )
                )
            yield tuple(joined)


def _right_before(group: list[Flow], part: set[str], depth: Mapping[str, int], called: Mapping[str, int]) -> str | None:
    """The one linear of a part that comes last before a group in it, if there is one, and each is called once."""
    sources = [source for source in group[0].sources if source in part]
    last = [source for source in sources if depth[source] == depth[group[0].name] - 1]
    once = all(called[name] == 1 for name in (*last, *(flow.name for flow in group)))
    changed = group[0].normed or group[0].gated or group[0].enters
    return last[0] if len(last) == 1 and once and not changed else None


# Torch's transformer layers: no trace goes through an encoder's


def _torchs(root: nn.Module, left: Mapping[str, Any]) -> Iterator[FFN]:
    """The FFNs of torch's transformer layers, of any sizes."""
    for name, module in root.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            yield _pair((join(name, "linear1"),), join(name, "linear2"), "the two linears of torch's transformer layer")


# How linears are registered


def _registered(root: nn.Module, left: Mapping[str, Any]) -> Iterator[FFN]:
    """D -> h and h -> d (gated: d -> h twice, or d -> 2h), registered one after the other, nothing linear between."""
    attentions = _attentions(root)
    for run in _runs(root):
        if len(run) > 3:
            continue
        if _match(root, run[:-1], run[-1]):
            yield _pair(tuple(run[:-1]), run[-1], "d -> h and h -> d in one block")
        elif run[0].rpartition(".")[0] not in attentions and len(run) == 2 and _holds_gate_and_up(root, *run):
            both = Group((run[0],), 0, True, False, False, parts=2)
            back = Group((run[1],), 1, False, True, True, gated=True)
            yield FFN((both, back), "d -> 2h and h -> d in one block: gate and up are one linear")


def _holds_gate_and_up(root: nn.Module, first: str, second: str) -> bool:
    """Whether `first` writes a gate and what it gates, for code to cut apart, and `second` reads their product."""
    (d, both), (h, back) = features(root.get_submodule(first)), features(root.get_submodule(second))
    return (d, both) == (back, 2 * h)


def _runs(root: nn.Module) -> Iterator[list[str]]:
    """Linears of one size and one block, and the next one, which has another size."""
    sizes = {name: features(module) for name, module in _linears(root).items()}
    run: list[str] = []
    for name, size in sizes.items():
        if run and _one_block(run[0], name):
            if size == sizes[run[0]]:
                run.append(name)
                continue
            yield [*run, name]
        run = [name]


def _match(root: nn.Module, columns: Collection[str], row: str) -> bool:
    into, out_of = {features(root.get_submodule(name)) for name in columns}, features(root.get_submodule(row))
    return into == {(out_of[1], out_of[0])}


def _one_block(*names: str) -> bool:
    """Whether linears lie in one block: none of them in another numbered part of the model."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return not any(part.isdigit() for p in parts for part in p[shared:])


def _pair(columns: tuple[str, ...], row: str, known_by: str) -> FFN:
    return FFN((Group(columns, 0, True, False, False), Group((row,), 1, False, True, True)), known_by)


def alone(name: str) -> FFN:
    """An FFN of one linear."""
    return FFN((Group((name,), 0, True, True, True),), "alone")


# Names


def join(owner: str, name: str) -> str:
    """The full name of what `owner` calls `name`."""
    return ".".join(part for part in (owner, name) if part)


def _owners(name: str) -> Iterator[str]:
    """The modules above `name`, the outermost first."""
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts)))


def _linears(root: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in root.named_modules() if is_linear(module)}
