"""GPT-2 under the strategies: its `Conv1D` keeps weights as [in, out], and so do checkpoints of the swapped model."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.data import DataLoader, TensorDataset
from training import trainer
from transformers.pytorch_utils import Conv1D
from zoo import MASK, TOKENS, gpt2

from lightning_phantom.config import PhantomConfig, TensorParallelConfig
from lightning_phantom.layers.phantom import PhantomLinear
from lightning_phantom.plan.finder import plan_tensor_parallel
from lightning_phantom.strategies.phantom import PhantomStrategy
from lightning_phantom.strategies.tensor_parallel import TensorParallelStrategy
from lightning_phantom.swap import carry_out, densify, phantomize_

MOVED = "model.transformer.h.0.mlp.c_fc.weight"


class Language(L.LightningModule):
    """A plain module around a Hugging Face model."""

    def __init__(self):
        super().__init__()
        self.model = gpt2()

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


STRATEGIES = {
    "phantom": lambda **kwargs: PhantomStrategy(num_blocks=4, phantom_width=1, **kwargs),
    "megatron": lambda **kwargs: TensorParallelStrategy(style="megatron", **kwargs),
    "layerwise": lambda **kwargs: TensorParallelStrategy(style="layerwise", **kwargs),
}


def fit(folder, name, steps, batch_size, ckpt_path=None, kind="sharded"):
    """Fit up to so many steps; return the dense weights that came of it, and save them after the first."""
    torch.manual_seed(3 + steps)
    module = Language().eval()
    run = trainer(folder, strategy=STRATEGIES[name](state_dict_type=kind), max_steps=steps, max_epochs=-1)
    run.fit(module, DataLoader(TensorDataset(TOKENS), batch_size=batch_size), ckpt_path=ckpt_path)
    if ckpt_path is None:
        assert type(module.model.transformer.h[0].mlp.c_fc) is not Conv1D
        run.save_checkpoint(f"{folder}/{name}_{kind}.ckpt")
    return densify(module).state_dict()


def two_steps_each(folder):
    """One step, saved both ways; then a second one, from what was saved."""
    results = {}
    for name in STRATEGIES:
        fit(folder, name, 1, 2, kind="full")
        results[name] = fit(folder, name, 1, 2), fit(folder, name, 2, 2, f"{folder}/{name}_sharded.ckpt")
    return results


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(2, two_steps_each, str(folder))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_shards_of_transposed_weights_are_resumed_on_one_rank(on_two_ranks, name):
    folder, results = on_two_ranks
    saved, expected = results[name]
    got = fit(folder, name, 2, 4, f"{folder}/{name}_sharded.ckpt")
    for key, value in expected.items():
        assert torch.allclose(got[key], value, rtol=0, atol=1e-5), key
    assert not torch.allclose(saved[MOVED], expected[MOVED], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_trained_checkpoint_loads_into_the_plain_module(on_two_ranks, name):
    folder, results = on_two_ranks
    plain = Language.load_from_checkpoint(f"{folder}/{name}_full.ckpt", weights_only=True)
    assert plain.state_dict()[MOVED].shape == (16, 64) and type(plain.model.transformer.h[0].mlp.c_fc) is Conv1D
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, results[name][0][key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize("inner", [16, 24])
def test_a_dense_state_dict_loads_into_a_swapped_model(inner):
    plan = {"*.c_fc": "phantom", "*.mlp.c_proj": "phantom"}
    config = PhantomConfig(4, 10**6, plan=plan)  # at 16 the weights are square: no shape tells which way they lie
    swapped = phantomize_(gpt2(n_inner=inner).eval(), config)
    torch.manual_seed(8)
    other = gpt2(n_inner=inner).eval()
    swapped.load_state_dict(other.state_dict())
    assert type(swapped.transformer.h[0].mlp.c_fc) is PhantomLinear
    assert torch.allclose(swapped(TOKENS)[0], other(TOKENS)[0], rtol=0, atol=1e-5)


def exact_layers():
    group = None if dist.get_world_size() == 1 else dist.group.WORLD
    results = []
    for style, inner in (("megatron", 16), ("megatron", 24), ("layerwise", 16), ("layerwise", 24)):
        torch.manual_seed(8)
        dense = gpt2(n_inner=inner).double().eval()
        torch.manual_seed(9)
        split = gpt2(n_inner=inner).double().eval()
        plan = plan_tensor_parallel(split, TensorParallelConfig(dist.get_world_size(), style=style))
        carry_out(split, plan, group, None)
        split.load_state_dict(dense.state_dict())
        outputs = [model(input_ids=TOKENS, attention_mask=MASK)[0] for model in (dense, split)]
        for output in outputs:
            output.square().sum().backward()
        embeddings = [model.transformer.wte.weight.grad for model in (dense, split)]
        plain = densify(split).state_dict()
        results.append(
            {
                "swapped": len(plan.swapped) == 4,
                "outputs": torch.allclose(*outputs, rtol=0, atol=1e-10),
                "gradients": torch.allclose(*embeddings, rtol=0, atol=1e-10),
                "dense again": all(torch.equal(value, plain[key]) for key, value in dense.state_dict().items()),
            }
        )
    return results


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallel_layers_compute_what_the_dense_ones_do(size):
    for results in run_ranks(size, exact_layers):
        for result in results:
            assert all(result.values()), results
