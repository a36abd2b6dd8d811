"""Models that nobody here wrote, unchanged: torch's transformer layers and Hugging Face's Llama, GPT-2, BERT, ViT."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from small configs; nothing is downloaded

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import trainer
from transformers.pytorch_utils import Conv1D

from lightning_phantom.config import PhantomConfig, TensorParallelConfig
from lightning_phantom.distributed.comm import record_traffic
from lightning_phantom.errors import LayoutError, PlanError
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.plan.finder import plan_phantom, plan_tensor_parallel
from lightning_phantom.strategies.phantom import PhantomStrategy
from lightning_phantom.strategies.tensor_parallel import TensorParallelStrategy
from lightning_phantom.swap import carry_out, densify, phantomize_

ROOT = Path(__file__).parents[2]
transformers.logging.set_verbosity_error()
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16}
TOKENS = torch.arange(12).view(2, 6) % 40
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x, src_key_padding_mask=MASK == 0)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x, x.flip(1))


def llama_config(**kwargs):
    return transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=1, attention_dropout=0.1, **kwargs)


def gpt2_config(**kwargs):
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **tokens, **kwargs)


def bert_config():
    return transformers.BertConfig(**SIZES, **TEXT)


def vit_config():
    return transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, hidden_dropout_prob=0.1)


def text(model):
    return model(input_ids=TOKENS, attention_mask=MASK)[0]


def learned(model):
    return model(input_ids=TOKENS, attention_mask=MASK, labels=TOKENS).loss.view(1)


def first_dtype(model):
    return next(model.parameters()).dtype


def features_in(model):
    return model(torch.linspace(-1, 1, 192, dtype=first_dtype(model)).view(2, 6, 16))


def image(model):
    return model(torch.linspace(-1, 1, 384, dtype=first_dtype(model)).view(2, 3, 8, 8))[0]


MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
# name: how to make it, how to call it, and what becomes of the feed-forward linears of each of its layers
MODELS = {
    "encoder": (Encoder, features_in, "layer.", {"linear1": "colwise", "linear2": "rowwise"}, 1),
    "decoder": (Decoder, features_in, "layer.", {"linear1": "colwise", "linear2": "rowwise"}, 1),
    "llama": (lambda: transformers.LlamaForCausalLM(llama_config()), learned, "model.layers.{}.mlp.", MLP, 2),
    "llama base": (lambda: transformers.LlamaModel(llama_config()), text, "layers.{}.mlp.", MLP, 2),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(gpt2_config()),
        learned,
        "transformer.h.{}.mlp.",
        {"c_fc": "colwise", "c_proj": "rowwise"},
        2,
    ),
    "gpt2 base": (
        lambda: transformers.GPT2Model(gpt2_config()),
        text,
        "h.{}.mlp.",
        {"c_fc": "colwise", "c_proj": "rowwise"},
        2,
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(bert_config()),
        learned,
        "bert.encoder.layer.{}.",
        {"intermediate.dense": "colwise", "output.dense": "rowwise"},
        2,
    ),
    "vit": (
        lambda: transformers.ViTModel(vit_config()),
        image,
        "layers.{}.mlp.",
        {"fc1": "colwise", "fc2": "rowwise"},
        2,
    ),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(1)
    return MODELS[name][0]().to(dtype)


def expected(name):
    _, _, prefix, decisions, layers = MODELS[name]
    return {prefix.format(n) + key: word for n in range(layers) for key, word in decisions.items()}


def classes(module):
    return {name: type(m) for name, m in module.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_the_feed_forward_linears_are_found_and_no_others(name):
    plan = plan_phantom(made(name), PhantomConfig(4, phantom_width=1))
    assert {layer.name: layer.decision for layer in plan.swapped} == expected(name)
    named = plan_phantom(made(name), PhantomConfig(4, plan=dict.fromkeys(expected(name), "phantom")))
    assert {layer.name: layer.decision for layer in named.swapped} == expected(name)


@pytest.mark.parametrize("name", MODELS)
def test_at_full_width_it_is_the_dense_model_and_densify_gives_it_back(name):
    _, call, *_ = MODELS[name]
    dense = made(name).eval()
    config = PhantomConfig(4, 10**6, plan=dict.fromkeys(expected(name), "phantom"), init="from_dense")
    swapped = phantomize_(made(name).eval(), config)
    assert sum(isinstance(m, PhantomLinear) for m in swapped.modules()) == len(expected(name))
    for grad in (True, False):  # torch's layers have a fast path of their own without gradients
        with torch.set_grad_enabled(grad):
            assert torch.allclose(call(swapped), call(dense), rtol=0, atol=1e-5)
    narrow = phantomize_(made(name).eval(), PhantomConfig(4, phantom_width=1))
    back = densify(narrow)
    assert not torch.allclose(call(narrow), call(dense), rtol=0, atol=1e-5)
    assert torch.allclose(call(back), call(narrow), rtol=0, atol=1e-5)
    assert classes(back) == classes(dense)
    assert {k: (v.shape, v.dtype) for k, v in back.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in dense.state_dict().items()
    }


def gathered(module, value=lambda p: p.grad):
    """The value of every parameter, of all ranks."""
    values = {}
    for name, layer in module.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            got = value(parameter)
            if got is not None and isinstance(layer, PhantomLinear):
                got = layer.ranks.all_gather(got)().flatten(0, 1)
            values[f"{name}.{kind}"] = got
    return values


def every_model_on_these_ranks():
    """What each model computes alone and together: outputs and gradients, in train and in eval mode."""
    different = []
    for name, (_, call, *_) in MODELS.items():
        modules = []
        for group in (None, dist.group.WORLD):
            modules.append(phantomize_(made(name, torch.float64), PhantomConfig(4, phantom_width=1), group))
        for training in (True, False):
            results = []
            for module in modules:
                module.train(training).zero_grad()
                torch.manual_seed(5)
                out = call(module)
                out.square().sum().backward()
                results.append({"output": out.detach(), **gathered(module)})
            alone, together = results
            for key, value in alone.items():
                same = (value is None) == (together[key] is None)
                if not same or (value is not None and not torch.allclose(together[key], value, rtol=1e-9, atol=1e-12)):
                    different.append((name, training, key))
        masked = any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules[0].modules())
        if masked and torch.equal(call(modules[0].train()), call(modules[0].eval())):
            different.append((name, "dropout does nothing"))
    return different


def gated_traffic():
    """What one gated feed-forward block sends, there and back."""
    model = phantomize_(transformers.LlamaModel(llama_config()), PhantomConfig(4, phantom_width=1), dist.group.WORLD)
    x = torch.randn(3, 16, requires_grad=True)
    with record_traffic() as there:
        out = model.layers[0].mlp(x)
    with record_traffic() as back:
        out.sum().backward()
    return there.calls, back.calls


class Language(L.LightningModule):
    """A plain module around a Hugging Face model."""

    def __init__(self):
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(gpt2_config())

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def one_step(folder):
    """Fit for a step on these ranks, save, and return the dense weights that came of it."""
    torch.manual_seed(3)
    module = Language()
    run = trainer(folder, strategy=PhantomStrategy(num_blocks=4, phantom_width=1), max_steps=1)
    run.fit(module, DataLoader(TensorDataset(TOKENS), batch_size=2))
    run.save_checkpoint(f"{folder}/one.ckpt")
    assert type(module.model.transformer.h[0].mlp.c_fc) is PhantomLinear
    return densify(module).state_dict()


STRATEGIES = {
    "phantom": lambda: PhantomStrategy(num_blocks=4, phantom_width=1, state_dict_type="sharded"),
    "megatron": lambda: TensorParallelStrategy(style="megatron", state_dict_type="sharded"),
    "layerwise": lambda: TensorParallelStrategy(style="layerwise", state_dict_type="sharded"),
}


def steps_from(folder, name, steps, ckpt_path=None):
    """Fit up to so many steps; return the dense weights that came of it, and save them in shards after the first."""
    torch.manual_seed(3 + steps)
    module = Language()
    run = trainer(folder, strategy=STRATEGIES[name](), max_steps=steps, max_epochs=-1)
    run.fit(module, DataLoader(TensorDataset(TOKENS), batch_size=2), ckpt_path=ckpt_path)
    if ckpt_path is None:
        run.save_checkpoint(f"{folder}/{name}{steps}.ckpt")
    return densify(module).state_dict()


def saved_in_shards(folder):
    """One step, saved; then a second one, from what was saved."""
    return {
        name: (steps_from(folder, name, 1), steps_from(folder, name, 2, f"{folder}/{name}1.ckpt"))
        for name in STRATEGIES
    }


def everything_on_two_ranks(folder):
    return every_model_on_these_ranks(), gated_traffic(), saved_in_shards(folder), one_step(folder)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(2, everything_on_two_ranks, str(folder))


def test_two_ranks_compute_what_one_does(on_two_ranks):
    _, results = on_two_ranks
    assert [different for different, *_ in results] == [[], []]


def test_a_gated_pair_shares_its_collectives(on_two_ranks):
    _, results = on_two_ranks
    for _, there, *_ in results:
        # Two layers' worth for three linears, and the boundaries: a gather at the exit, and the entry's gradient.
        assert there == ({"all_gather": 2 + 1}, {"reduce_scatter": 2, "all_gather": 1})


def test_a_trained_checkpoint_loads_into_the_plain_module(on_two_ranks):
    folder, results = on_two_ranks
    torch.manual_seed(3)
    before = Language()
    plain = Language.load_from_checkpoint(f"{folder}/one.ckpt", weights_only=True)
    name = "model.transformer.h.0.mlp.c_fc.weight"
    assert plain.state_dict()[name].shape == (16, 64) and type(plain.model.transformer.h[0].mlp.c_fc) is Conv1D
    for key, value in plain.state_dict().items():
        assert torch.equal(value, results[0][-1][key]), key
    weights = torch.load(f"{folder}/one.ckpt", weights_only=True)["state_dict"]
    assert list(weights) == list(before.state_dict())
    before.load_state_dict(weights)
    assert not torch.equal(Language().state_dict()[name], weights[name])


@pytest.mark.parametrize("name", STRATEGIES)
def test_shards_of_transposed_weights_are_resumed_on_one_rank(on_two_ranks, name):
    folder, results = on_two_ranks
    saved, expected = results[0][2][name]
    got = steps_from(folder, name, 2, f"{folder}/{name}1.ckpt")
    for key, value in expected.items():
        assert torch.allclose(got[key], value, rtol=0, atol=1e-5), key
    moved = "model.transformer.h.0.mlp.c_fc.weight"
    assert not torch.allclose(saved[moved], expected[moved], rtol=0, atol=1e-3)


def test_a_model_is_planned_once(tmp_path, monkeypatch):
    plans = []
    own = PhantomStrategy._plan
    monkeypatch.setattr(PhantomStrategy, "_plan", lambda *args: plans.append(own(*args)) or plans[-1])
    strategy = PhantomStrategy(num_blocks=4)
    data = DataLoader(TensorDataset(TOKENS), batch_size=2)
    trainer(tmp_path, devices=1, strategy=strategy, max_steps=1).fit(Language(), data)
    assert len(plans) == 1 and strategy.plan is plans[0]


@pytest.mark.parametrize("inner", [16, 24])
def test_a_dense_state_dict_of_a_conv1d_loads_into_a_swapped_one(inner):
    config = gpt2_config(n_inner=inner)  # at 16 the weights are square: no shape tells which way they lie
    plan = {"*.c_fc": "colwise", "*.mlp.c_proj": "rowwise"}
    swapped = phantomize_(transformers.GPT2LMHeadModel(config).eval(), PhantomConfig(4, 10**6, plan=plan))
    torch.manual_seed(8)
    other = transformers.GPT2LMHeadModel(config).eval()
    swapped.load_state_dict(other.state_dict())
    assert torch.allclose(text(swapped), text(other), rtol=0, atol=1e-5)


def _exact_conv1d():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    results = []
    for style, inner in (("megatron", 16), ("megatron", 24), ("layerwise", 16), ("layerwise", 24)):
        torch.manual_seed(8)
        dense = transformers.GPT2LMHeadModel(gpt2_config(n_inner=inner)).double().eval()
        torch.manual_seed(9)
        split = transformers.GPT2LMHeadModel(gpt2_config(n_inner=inner)).double().eval()
        plan = plan_tensor_parallel(split, TensorParallelConfig(dist.get_world_size(), style=style))
        carry_out(split, plan, group, None)
        split.load_state_dict(dense.state_dict())
        text(dense).square().sum().backward()
        text(split).square().sum().backward()
        plain = densify(split)
        results.append(
            {
                "swapped": len(plan.swapped) == 4,
                "outputs": torch.allclose(text(split), text(dense), rtol=0, atol=1e-10),
                "gradients": all(
                    torch.allclose(a.grad, b.grad, rtol=0, atol=1e-10)
                    for a, b in ((split.transformer.wte.weight, dense.transformer.wte.weight),)
                ),
                "dense again": type(plain.transformer.h[0].mlp.c_fc) is Conv1D
                and all(torch.equal(value, plain.state_dict()[key]) for key, value in dense.state_dict().items()),
            }
        )
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallel_conv1d_is_the_dense_one(size):
    for results in run_ranks(size, _exact_conv1d):
        for result in results:
            assert all(result.values()), results


@pytest.mark.parametrize("activation", ["gelu", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu2"])
def test_their_activations_are_elementwise(activation):
    model = transformers.LlamaModel(llama_config(hidden_act=activation))
    plan = plan_phantom(model, PhantomConfig(4, phantom_width=1))
    assert len(plan.swapped) == 6, plan


def test_an_activation_with_parameters_is_not():
    model = transformers.LlamaModel(llama_config(hidden_act="xielu"))
    plan = plan_phantom(model, PhantomConfig(4, phantom_width=1))
    assert not plan.swapped and "outside any chain" in plan.layers[4].reason


def reasons(module, **config):
    return {layer.name: layer.reason for layer in plan_phantom(module, PhantomConfig(4, **config)).layers}


def test_reasons_name_the_models_own_plan_and_ties():
    why = reasons(transformers.LlamaForCausalLM(llama_config()), phantom_width=1)
    assert why["model.layers.1.mlp.up_proj"] == "chain in model.layers.1.mlp, traced"
    assert why["model.layers.1.self_attn.o_proj"] == "left exact ('rowwise' in the model's own TP plan)"
    head = "left exact ('colwise_gather_output' in the model's own TP plan, a word that is not used here)"
    assert why["lm_head"].startswith(head)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = transformers.LlamaModel(llama_config())

    why = reasons(Wrapped(), phantom_width=1)
    assert why["net.layers.0.self_attn.q_proj"] == "left exact ('colwise' in the model's own TP plan)"
    assert reasons(made("gpt2"))["lm_head"] == "its weights are tied to those of 'transformer.wte'"
    with pytest.raises(PlanError, match=r"lm_head: its weights are tied to those of 'transformer.wte'"):
        plan_phantom(made("gpt2"), PhantomConfig(4, plan={"lm_head": "phantom"}))


def test_a_member_called_outside_its_owner_raises():
    bert = phantomize_(made("bert"), PhantomConfig(4, phantom_width=1)).bert
    with pytest.raises(LayoutError, match=r"layer.0.intermediate.dense' was called outside .* 'bert.encoder.layer.0'"):
        bert.encoder.layer[0].intermediate(torch.ones(1, 2, 16))


def test_attention_is_swapped_when_a_plan_names_it():
    plan = {"*.mlp.*": "phantom", "*.c_attn": "phantom", "*.q_proj": "phantom", "*.o_proj": "phantom"}
    for name, globs in (("gpt2 base", ["*.mlp.*", "*.c_attn"]), ("llama base", ["*.mlp.*", "*.q_proj", "*.o_proj"])):
        dense = made(name).eval()
        swapped = phantomize_(made(name).eval(), PhantomConfig(4, 10**6, plan={g: plan[g] for g in globs}))
        assert sum(isinstance(m, PhantomLinear) for m in swapped.modules()) > len(expected(name))
        assert torch.allclose(text(swapped), text(dense), rtol=0, atol=1e-5)
        assert classes(densify(swapped)) == classes(dense)
    with pytest.raises(PlanError, match=r"'h.0.attn.c_attn': 'colwise' is not proven"):
        plan_phantom(made("gpt2 base"), PhantomConfig(4, plan={"h.0.attn.c_attn": "colwise"}))


class Fused(nn.Module):
    """A feed-forward block with a kernel in it that cannot be traced."""

    def __init__(self, **modules):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj = nn.Linear(32, 16)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        assert bool(gate.isfinite().all())
        return self.down_proj(torch.sigmoid(gate) * up)


class Declares(nn.Module):
    """A model with a tensor parallel plan of its own, as Hugging Face's models have them."""

    base_model_prefix = "model"

    def __init__(self, block, down="rowwise", name="mlp"):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({name: block})])
        words = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": down}
        self._tp_plan = {f"layers.*.{name}.{key}": word for key, word in words.items()}

    def forward(self, x):
        return next(iter(self.layers[0].values()))(x)


def test_a_declared_layout_is_taken_where_tracing_fails():
    torch.manual_seed(0)
    model, x = Declares(Fused()), torch.randn(3, 16)
    plan = plan_phantom(model, PhantomConfig(4, 10**6, init="from_dense"))
    assert [layer.decision for layer in plan.layers] == ["skip"] * 3  # at full width it would not shrink
    plan = plan_phantom(model, PhantomConfig(4, 1))
    assert [layer.decision for layer in plan.layers] == ["colwise", "colwise", "rowwise"]
    for layer in plan.layers:
        assert re.match(
            r"chain in layers.0.mlp, not traced \(TraceError: .*\) but declared by the model's own TP plan",
            layer.reason,
        )
    phantomize_(model, PhantomConfig(4, 1))
    assert torch.allclose(model(x), densify(model)(x), atol=1e-6)
    with pytest.raises(LayoutError, match=r"'layers.0.mlp.up_proj' was called outside the forward of 'layers.0.mlp'"):
        model.layers[0]["mlp"].up_proj(x)


class Mixes(Fused):
    def forward(self, x):
        return self.down_proj(torch.softmax(self.gate_proj(x), -1) * self.up_proj(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Declares(Mixes()), "softmax"),  # traced, and so what is declared counts for nothing
        (lambda: Declares(Fused(), name="self_attn"), "'colwise' in the model's own TP plan"),
        (lambda: Declares(Fused(), down="sequence_parallel"), "'colwise' in the model's own TP plan"),
        (lambda: Declares(Fused(drop=nn.Dropout(0.1))), "'colwise' in the model's own TP plan"),
        (lambda: Declares(Fused(scale=nn.Parameter(torch.ones(32)))), "'colwise' in the model's own TP plan"),
        (lambda: Declares(Fused(more=nn.Linear(16, 16))), "'colwise' in the model's own TP plan"),
    ],
)
def test_a_declared_layout_is_not_taken_where_it_may_be_wrong(model, reason):
    why = reasons(model())
    assert [layer.decision for layer in plan_phantom(model(), PhantomConfig(4)).swapped] == []
    assert all(why[f"layers.0.{name}.gate_proj"].startswith("left exact") for name in model().layers[0])
    assert any(reason in text for text in why.values())
    if model()._tp_plan.popitem()[1] == "sequence_parallel":
        assert "'sequence_parallel' in the model's own TP plan, a word that is not used here" in str(why)
