"""What needs CUDA devices, two of them for ranks on NCCL. Skipped elsewhere: no result of this project rests on it.

`benchmarks/gpu.sh --device cpu` runs it without one, to see that the tests themselves are in order.
"""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import oracle
from torch import nn
from training import Net, loader, trainer

from lightning_phantom import PhantomConfig, PhantomLinear, PhantomStrategy, phantomize_

DEVICE = os.environ.get("PHANTOM_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and DEVICE == "cuda", reason="no CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-2)])
def test_a_layer_equals_the_oracle(dtype, tolerance):
    layer = PhantomLinear(64, 32, num_blocks=4, phantom_width=4, device=DEVICE, dtype=dtype)
    x = torch.randn(10, 64, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn(10, 32, device=DEVICE, dtype=dtype)
    z = layer(x)
    z.backward(grad)
    factors = [f.detach().cpu().double() for f in layer.factors() if f is not None]
    expected_z, expected = oracle(factors, x.detach().cpu().double(), grad.cpu().double(), 4)
    got = [z.detach(), *(f.grad for f in layer.factors() if f is not None), x.grad]
    for a, b in zip(got, [expected_z, *expected], strict=True):
        assert torch.allclose(a.cpu().double(), b, atol=tolerance * float(b.abs().max()), rtol=0)


def test_one_device_trains_what_the_cpu_trains(tmp_path):
    def losses(accelerator):
        torch.manual_seed(0)
        module = Net(dropout=0.0)
        strategy = PhantomStrategy(num_blocks=4)
        trainer(tmp_path, devices=1, strategy=strategy, accelerator=accelerator).fit(module, loader())
        return module.losses

    assert losses(DEVICE) == pytest.approx(losses("cpu"), rel=1e-3)


def _chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return model.double(), torch.randn(3, 32, dtype=torch.float64, requires_grad=True)


def _chain_on_ranks(backend):
    """The chain on this rank's own device, or over gloo on one device for all."""
    device = torch.device(DEVICE, dist.get_rank() if backend == "nccl" else 0)
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    model, x = _chain()
    # Swapped in host memory and then moved, as by a strategy.
    model = phantomize_(model, PhantomConfig(num_blocks=4), dist.new_group(backend=backend)).to(device)
    z = model(x.to(device))
    z.square().sum().backward()
    return z.detach().cpu(), x.grad


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_ranks_equal_one_process(backend):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    model, x = _chain()
    model = phantomize_(model, PhantomConfig(num_blocks=4))
    z = model(x)
    z.square().sum().backward()
    for z_there, grad_there in run_ranks(2, _chain_on_ranks, backend):
        assert torch.allclose(z_there, z.detach(), atol=1e-10)
        assert torch.allclose(grad_there, x.grad, atol=1e-10)
