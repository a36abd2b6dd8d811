"""One file owns the format; what it says of layers is what they say of themselves."""

import ast
from pathlib import Path

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightning_phantom
from lightning_phantom import PhantomLinear
from lightning_phantom.checkpoints import format
from lightning_phantom.checkpoints.format import PhantomRecord, check_fits, describe, describe_phantom, with_entry
from lightning_phantom.errors import CheckpointError

PACKAGE = Path(lightning_phantom.__file__).parent
KEYS = {value for name, value in vars(format).items() if isinstance(value, str) and not name.startswith("__")}
READERS = [
    *(path for path in (PACKAGE / "checkpoints").glob("*.py") if path.name != "format.py"),
    *(
        PACKAGE / "conversion" / name
        for name in ("files.py", "from_phantom.py", "on_disk.py", "result.py", "to_phantom.py")
    ),
    PACKAGE / "strategies" / "saving.py",
]


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.name)
def test_no_other_file_spells_a_key(path):
    assert {"phantom", "version", "method", "layers", "factors", "split", "optimizers", "rng", "converted"} <= KEYS
    texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    assert not texts & KEYS


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [nn.Linear, Conv1D])
def test_a_record_made_without_the_layer_is_the_layers_own(bias, dense):
    layer = PhantomLinear(16, 32, 4, 2, bias, dense_class=dense)
    ours = PhantomRecord(16, 32, bias, 2, dense is Conv1D)
    assert ours.as_dict() == layer.record() and PhantomRecord(**layer.record()) == ours
    assert describe_phantom("phantom", 4, {"0": ours}) == describe(nn.Sequential(layer))


def a_net(num_blocks=4, phantom_width=2, dense=nn.Linear):
    sizes = ((16, 32), (32, 16))
    return nn.Sequential(*(PhantomLinear(*size, num_blocks, phantom_width, dense_class=dense) for size in sizes))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (a_net(8), "saved with num_blocks=8, the model has num_blocks=4: set num_blocks=8"),
        (a_net(4, 3), "'0' has phantom_width=3 in the checkpoint and .*=2 in the model; resume with the phantom_width"),
        (a_net(dense=Conv1D), "'0' has transposed=True in the checkpoint and .* resume with the module"),
        (nn.Sequential(a_net(), a_net()), "'0.0' is a phantom layer only in the checkpoint"),
    ],
    ids=["blocks", "width", "orientation", "layers"],
)
def test_another_model_is_refused(other, said):
    saved = with_entry({"state_dict": {}}, describe(other))
    check_fits(other, saved)
    with pytest.raises(CheckpointError, match=said):
        check_fits(a_net(), saved)
    check_fits(a_net(), {"state_dict": {}})
