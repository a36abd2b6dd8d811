"""Models that nobody here wrote: what is found in them, and that the swapped model is the dense one at full width."""

import re
import time

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from ranks import run_ranks
from zoo import MODELS, call, llama, made

from examples.digits import DigitsClassifier
from examples.lm import LanguageModel
from lightning_phantom.config import PhantomConfig
from lightning_phantom.layers.activation import watch_gathers
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.layers.split import sharded_parameters
from lightning_phantom.plan.finder import plan_phantom
from lightning_phantom.swap import densify, phantomize_

NARROW = PhantomConfig(2, phantom_width=1)
# Whose norms sum their gradient in float32, whatever the type of the model.
ROUGH = {"gemma3": 1e-6}
# Its GELU is an autograd function, which sees plain values.
GATHERS = {"bloom": {"mul"}}


@pytest.mark.parametrize("name", MODELS)
def test_the_feed_forward_linears_are_found_and_no_others(name):
    plan = plan_phantom(made(name), NARROW)
    wanted = [layer.name for layer in plan.layers if re.search(f"{MODELS[name].pattern}$", layer.name)]
    assert [layer.name for layer in plan.swapped] == wanted and len(wanted) == MODELS[name].linears, plan
    assert all(layer.reason.startswith("FFN: ") for layer in plan.swapped)
    assert len(plan.siblings()) == MODELS[name].linears // 3 * ("gate" in MODELS[name].pattern or "gated" in name)


def loss(output):
    """A sum over the batch in which no output counts like another."""
    return (output * torch.arange(output[0].numel()).sin().view(output[0].shape)).sum()


def same(got, expected, tolerance):
    return (got is None) == (expected is None) and (
        got is None or bool((got - expected).abs().max() <= tolerance * max(1, expected.abs().max()))
    )


def full_width(name):
    names = [layer.name for layer in plan_phantom(made(name), NARROW).swapped]
    return PhantomConfig(2, phantom_width=1.0, plan=dict.fromkeys(names, "phantom"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_at_full_width_it_is_the_dense_model_and_densify_gives_it_back(name, dtype):
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    dense = made(name, dtype)
    swapped = phantomize_(made(name, dtype), full_width(name))
    assert sum(isinstance(m, PhantomLinear) for m in swapped.modules()) == MODELS[name].linears
    expected, output = call(name, dense), call(name, swapped)
    assert same(output, expected, tolerance)
    loss(expected).backward()
    loss(output).backward()
    grads = dict(dense.named_parameters())
    for key, parameter in swapped.named_parameters():
        module = swapped.get_submodule(key.rpartition(".")[0])
        if not isinstance(module, PhantomLinear) or key.endswith(".bias"):
            assert same(parameter.grad, grads[key].grad, tolerance), key
    with torch.no_grad():  # where torch's layers have a fast path of their own
        assert same(call(name, swapped), call(name, dense), tolerance)
        back = densify(swapped)
        assert same(call(name, back), call(name, dense), tolerance)
    assert [(n, type(m)) for n, m in back.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    for key, value in dense.state_dict().items():
        assert same(back.state_dict()[key], value, tolerance), key


# The examples, and what only a model's activation changes


def test_the_networks_of_the_examples_are_found():
    swapped = [layer.name for layer in plan_phantom(DigitsClassifier(), NARROW).swapped]
    assert swapped == ["net.0", "net.3", "net.6", "net.9"]
    assert len(plan_phantom(DigitsClassifier(), PhantomConfig(4)).swapped) == 3  # 10 does not divide
    swapped = [layer.name for layer in plan_phantom(LanguageModel(), NARROW).swapped]
    assert swapped and all(re.fullmatch(r"blocks\.\d\.mlp\.\w+", name) for name in swapped)


@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu2", "xielu"]
)
def test_any_activation_of_theirs_will_do(activation):
    model = llama(hidden_act=activation)
    assert len(plan_phantom(model, NARROW).swapped) == 6


def test_a_bert_of_24_layers_is_planned_within_two_seconds():
    with torch.device("meta"):
        model = hf.BertForMaskedLM(
            hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    start = time.process_time()
    plan = plan_phantom(model, PhantomConfig(8))
    assert time.process_time() - start < 2
    assert len(plan.swapped) == 48 and "bert.encoder.layer.{0-23}.intermediate.dense" in str(plan)


# Two ranks, each with a half of the batch


def of_all_ranks(module, value):
    """`value` of every parameter: shards put together, what every rank holds averaged over the ranks."""
    splits, values = sharded_parameters(module), {}
    for name, parameter in module.named_parameters():
        got = value(parameter)
        if got is not None and id(parameter) in splits:
            got = splits[id(parameter)].gather(got)
        elif got is not None and dist.is_initialized():
            dist.all_reduce(got)
            got = got / dist.get_world_size()
        values[name] = got
    return values


def outputs_and_gradients(name, group):
    """Outputs for own part of the batch, gradients of their loss, and what gathered inside networks."""
    model = made(name)
    plan = plan_phantom(model, NARROW)
    phantomize_(model, NARROW, group)
    part = slice(None) if group is None else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    with watch_gathers() as seen:
        output = call(name, model, part)
    (loss(output) * (4 / len(output))).backward()  # the mean over the ranks is the whole batch's sum
    ends = {layer for ffn in plan.ffns for g in ffn.groups if g.leaves for layer in g.names}
    inside = {gathered.operation for gathered in seen if gathered.layer not in ends}
    return output.detach(), {key: p.grad for key, p in model.named_parameters()}, model, inside, len(seen)


def every_model_on_two_ranks():
    results = {}
    for name in MODELS:
        output, _, model, inside, gathers = outputs_and_gradients(name, dist.group.WORLD)
        results[name] = output, of_all_ranks(model, lambda p: p.grad), inside, gathers
    return results


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, every_model_on_two_ranks)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_with_halves_of_a_batch_compute_what_one_does_with_the_whole(name, on_two_ranks):
    output, grads, *_ = outputs_and_gradients(name, None)
    tolerance = ROUGH.get(name, 1e-10)
    assert same(torch.cat([results[name][0] for results in on_two_ranks]), output, tolerance)
    for results in on_two_ranks:
        assert results[name][1].keys() == grads.keys()
        for key, grad in results[name][1].items():
            assert same(grad, grads[key], tolerance), key


@pytest.mark.parametrize("name", MODELS)
def test_nothing_gathers_inside_their_networks(name, on_two_ranks):
    for results in on_two_ranks:
        *_, inside, gathers = results[name]
        assert inside == GATHERS.get(name, set()) and gathers > 0
