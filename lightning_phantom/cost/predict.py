"""Predicts how long a step takes by each method: its stages, one by one, on a `machine`.

Products, copies and collectives are those of the layers. Beside a phantom layer's latents lie the products with its
diagonal blocks (and those of the layer before, where they are made of that one's input), beside what an exact layer
gathers its own share's, beside gradients that are averaged the whole backward, beside weights that FSDP gathers the
products of their own layer (it gathers the next layer's meanwhile). Nothing runs beside what enters, leaves, or is
summed by a row-parallel layer, nor beside what torch's own sums.

Of what is neither a linear nor a collective little can be known without running the model. Two things are counted: one
operation that treats every output of a linear by itself (forward it reads and writes it, backward it reads two and
writes one), and an optimizer that reads weight and gradient and writes the weight, as SGD does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_phantom.cost.collectives import Collective, Cut, Group, cuts, exact_collectives, phantom_collectives
from lightning_phantom.cost.count import TENSOR_PARALLEL, Cost, element_bytes_of
from lightning_phantom.cost.data_parallel import NOTHING, Dense, Divided
from lightning_phantom.cost.layer import Layer, as_layers, is_row, latents_of
from lightning_phantom.cost.machine import Machine, Stage, StepTime, Work, copy, product, step_time
from lightning_phantom.cost.methods import METHODS


def predict(
    layers: Sequence[Layer],
    num_blocks: int,
    phantom_width: int | float,
    num_ranks: int,
    tokens: int,
    machine: Machine,
    dtype: str = "float32",
    rest: Dense = NOTHING,
    exact: Divided | None = None,
    smaller: Dense | None = None,
    held: Mapping[str, int] | None = None,
) -> dict[str, StepTime]:
    """Predict the step of a model by method (`METHODS`).

    The arguments are `estimate_cost`'s; `layers` come from `Plan.cost_layers`, and `rest` is what else the model has.
    `exact` is how tensor parallelism divides it, if not into the same; `smaller` is the smaller dense model, if any.
    `held` are the parameters of a rank, by method; without it linears and collectives alone count.
    """
    model = Divided(tuple(layers), rest)
    exact, size = exact or model, element_bytes_of(dtype)
    group, of_ranks = Group(num_ranks, tokens, size), (num_ranks, tokens, dtype)
    phantom: list[Stage] = []
    for layer in model.layers:
        phantom += phantom_stages(layer.with_width(phantom_width, num_blocks), num_blocks, group)
    dense = model.dense
    stages = {
        "ddp": _replicated(dense, dense.cost(*of_ranks), group),
        "fsdp": _fully_sharded(dense, group),
    }
    for method in TENSOR_PARALLEL if exact.layers else ():
        cut = [s for each in cuts(exact.layers, method) for s in exact_stages(*each, group)]
        # Outside its layers every rank of torch's own has all tokens, and no gradient is averaged.
        ranks = 1 if method == "tensor_parallel_torch" else num_ranks
        averaged = exact.averaged(method == "tensor_parallel", ranks, tokens, dtype)
        stages[method] = _replicated(exact.rest, averaged, replace(group, num_ranks=ranks), cut)
    stages["phantom"] = _replicated(rest, rest.cost(*of_ranks), group, phantom)
    if smaller is not None:
        stages["smaller"] = _replicated(smaller, smaller.cost(*of_ranks), group)
    for method, weights in (held or {}).items():
        own = -(-tokens // num_ranks)
        outputs = own * (smaller if method == "smaller" and smaller else dense).outputs
        if method == "tensor_parallel_torch":  # of these every rank has all tokens
            summed = sum(layer.out_features for layer in as_layers(exact.layers) if is_row(layer))
            outputs += (tokens - own) * (exact.rest.outputs + summed)
        stages[method] += [Stage(elementwise(outputs)), Stage(Work(elements=3 * weights))]
    return {method: step_time(stages[method], machine, size) for method in METHODS if method in stages}


def elementwise(elements: int) -> Work:
    """An operation that treats so many elements one by one, and its backward."""
    return Work(elements=5 * elements, ops=2)


def _replicated(dense: Dense, averaged: Cost, group: Group, beside: Sequence[Stage] = ()) -> list[Stage]:
    """What every rank computes of its own tokens; gradients are averaged during all of the backward."""
    ranks, size = group.num_ranks, group.element_bytes
    alone = Group(1, -(-group.tokens // ranks), size)
    stages = [*beside, *(s for layer in dense.layers for s in exact_stages(layer, Cut(), alone))]
    backward = sum((stage.work for stage in stages if stage.backward), Work())
    # Into buckets and back; the sum itself is torch's all-reduce.
    weights = averaged.weight_bytes * ranks // (2 * size * max(ranks - 1, 1))
    copies = Work(elements=4 * weights)
    return [*stages, Stage(copies, backward, averaged.weight_bytes, averaged.calls, True, "all_reduce")]


def _fully_sharded(dense: Dense, group: Group) -> list[Stage]:
    """The same under FSDP, which gathers weights layer by layer, and those that are of no linear together."""
    alone = Group(1, -(-group.tokens // group.num_ranks), group.element_bytes)
    stages = _sharded(dense.weights, Work(), Work(), group)
    for layer in dense.layers:
        forward, backward = exact_stages(layer, Cut(), alone)
        stages += [forward, backward, *_sharded(layer.dense_weights, forward.work, backward.work, group)]
    return stages


def _sharded(weights: int, forward: Work, backward: Work, group: Group) -> list[Stage]:
    """What FSDP does with weights beside the work that needs them: gathers them twice, and sums their gradients."""
    ranks = group.num_ranks
    if ranks == 1 or not weights:
        return []
    sent = (ranks - 1) * weights * group.element_bytes // ranks
    gathered = copy(weights) + copy(weights // ranks)  # a shard into what is sent, and the whole out of what came
    return [
        Stage(gathered, forward, sent, 1),
        Stage(gathered, backward, sent, 1, True),
        Stage(copy(weights), backward, sent, 1, True, "reduce_scatter"),
    ]


def exact_stages(layer: Layer, cut: Cut, group: Group) -> list[Stage]:
    """Forward and backward of a dense layer that is cut so, in the words of `layers.tensor_parallel`."""
    ranks, tokens, row = group.num_ranks, group.tokens, cut.row
    in_here, out_here = layer.in_features, layer.out_features
    in_here, out_here = (in_here // ranks, out_here) if row else (in_here, out_here // ranks)
    weight_grad = product(1, out_here, tokens, in_here)
    backward = weight_grad + copy(tokens * out_here)
    own_share = product(1, out_here, tokens // ranks, in_here)  # of a row-parallel layer's backward
    if layer.needs_input_grad:
        backward += product(1, tokens, out_here, in_here)
        own_share += product(1, tokens // ranks, out_here, in_here)
    if not row:
        own_tokens, own_features = (tokens // ranks, in_here) if layer.enters else (tokens, in_here // ranks)
        own_share = product(1, own_tokens, own_features, out_here)  # of a column-parallel layer's forward
    behind = {
        ("input", False, False): own_share,
        ("input", True, False): weight_grad,
        ("output", True, True): own_share,
    }
    stages = [Stage(product(1, tokens, in_here, out_here)), Stage(backward, backward=True)]
    if cut.by_torch:
        return stages + [_stage(sent, Work(), Work()) for sent in exact_collectives(layer, group, cut)]
    for sent in exact_collectives(layer, group, cut):
        exchanged = sent.of == ("input" if row else "output")
        width = layer.in_features if row else layer.out_features
        around = copy(tokens * width // ranks) if exchanged else Work()
        stages.append(_stage(sent, around, behind.get((sent.of, sent.backward, row), Work())))
    return stages


def phantom_stages(layer: Layer, num_blocks: int, group: Group) -> list[Stage]:
    """Forward and backward of a phantom layer, whose width is resolved, in the words of `layers.operator`."""
    p, q, tokens = num_blocks, num_blocks // group.num_ranks, group.tokens
    m_in, m_out, latents = layer.in_features // p, layer.out_features // p, latents_of(layer, num_blocks)
    m_of, made = latents.in_features // p, latents.made
    local = product(q, tokens, m_in, m_out)  # L x
    forward = product(q, tokens, m_of, made) + local
    forward += copy(tokens * p * made) + copy(tokens * q * m_out)
    backward = product(q, made, tokens, m_of) + copy(tokens * q * m_out)  # dC and db
    if latents.needs_grad:
        backward += product(q, tokens, made, m_of)  # C^T h
    factors = product(q, m_out, tokens, m_in)  # dL
    if layer.needs_input_grad:
        factors += product(q, tokens, m_out, m_in)  # L^T d
    for others in ((p - 1) * width for width in (latents.width, latents.before) if width):
        forward += product(q, tokens, others, m_out) + copy(q * tokens * others)
        backward += product(q, tokens, m_out, others) + copy(q * tokens * others) + copy(tokens * p * made)  # h
        factors += product(q, m_out, tokens, others)  # dD
    stages = [Stage(forward), Stage(backward + factors, backward=True)]
    beside = {False: local, True: factors}
    if layer.latents == "previous" and layer.predecessor is not None:
        theirs = layer.predecessor.in_features // p, layer.predecessor.out_features // p
        beside[False] = Work() if latents.with_others else local + product(q, tokens, *theirs)
        beside[True] += product(q, theirs[1], tokens, theirs[0])
    for sent in phantom_collectives(layer, group, p):
        if sent.of == "latents":
            stages.append(_stage(sent, Work(), beside[sent.backward]))
        elif sent.of == "statistics":
            stages.append(_stage(sent, Work(), Work()))
        else:
            width = layer.in_features if sent.of == "input" else layer.out_features
            stages.append(_stage(sent, copy(tokens * width // group.num_ranks), Work()))
    return stages


def _stage(sent: Collective, work: Work, behind: Work) -> Stage:
    return Stage(work, behind, sent.sent_bytes, sent.calls, sent.backward, sent.kind)
