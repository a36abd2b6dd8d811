"""What a backend that knows devices only, as NCCL does, is given: seen without a device.

Fake tensors have a device and a shape, but no numbers, and the group is torch's own fake one, for CUDA alone.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_phantom import PhantomConfig, swap
from lightning_phantom.checkpoints.full import make_full
from lightning_phantom.config import TensorParallelConfig
from lightning_phantom.distributed.gradients import clip_grad_norm_
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.distributed.replicas import _gather
from lightning_phantom.layers.split import sharded_parameters, split_layers
from lightning_phantom.plan.finder import plan_phantom, plan_tensor_parallel

PLANS = {
    "phantom": lambda model: plan_phantom(model, PhantomConfig(4)),
    "block_diagonal": lambda model: plan_phantom(model, PhantomConfig(4, init="block_diagonal")),
    "random": lambda model: plan_phantom(model, PhantomConfig(4, init="random")),
    "megatron": lambda model: plan_tensor_parallel(model, TensorParallelConfig(2)),
    "layerwise": lambda model: plan_tensor_parallel(model, TensorParallelConfig(2, style="layerwise")),
}


class DevicesOnly(TorchDispatchMode):
    """Refuses collectives of tensors in host memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            hosts = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.device.type != "cuda"]
            assert not hosts, f"{function} of {hosts}"
        return function(*args, **kwargs or {})


def apply(module, function, recurse=True):
    """What `nn.Module._apply` does for `to_empty`; it cannot exchange fake parameters in their place."""
    for m in module.modules():
        for name, parameter in m._parameters.items():
            if parameter is not None:
                m._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    return module


@pytest.fixture(params=[0, 1])
def devices_only(request, monkeypatch):
    dist.init_process_group("cuda:fake", store=FakeStore(), rank=request.param, world_size=2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(swap, "_check_weights", lambda *_: None)  # it looks at numbers
    with FakeTensorMode(allow_non_fake_inputs=True), DevicesOnly():
        yield dist.group.WORLD


@pytest.mark.parametrize("kind", PLANS)
def test_weights_on_the_host_are_sent_by_the_device(devices_only, kind):
    """A strategy swaps layers before it moves the model, and averages or loaded states may stay on the host."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    plan = PLANS[kind](model)
    assert len(plan.swapped) == 2
    swap.carry_out(model, plan, devices_only, devices_only)
    model.load_state_dict({"0.weight": torch.randn(64, 32), "0.bias": torch.randn(64)}, strict=False)

    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for norm_type in (2.0, float("inf")):
        clip_grad_norm_(model.parameters(), 1.0, sharded_parameters(model), norm_type)
    optimizer.step()

    states = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    make_full(model, states, [optimizer])
    assert _gather(torch.ones(3), Ranks(devices_only)).shape == (2, 3)
    tensors = [*model.parameters(), *(layer.dense_weight() for layer in split_layers(model).values())]
    assert {t.device.type for t in tensors} == {"cpu"}
