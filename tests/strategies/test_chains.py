"""Private mixing and chains' latents through the strategy: training on any ranks, checkpoints, what is refused."""

import itertools
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from torch import nn
from training import Net, loader, own, trainer, weights

from lightning_phantom import PhantomConfig, PhantomLinear, PhantomStrategy, densify, phantomize_, plan_phantom
from lightning_phantom.errors import CheckpointError, PhantomError
from lightning_phantom.layers.split import split_layers

KINDS = {
    "private": {"mixing": "private"},
    "both": {"latents": "both"},
    "private and both": {"mixing": "private", "latents": "both"},
    "previous": {"latents": "previous"},
}
FORMATS = ("full", "sharded")


def strategy(kind, **sizes):
    return PhantomStrategy(0.5, 4, init="random", **KINDS[kind], **sizes)


def _fit(folder, kind, epochs, ckpt=None, **sizes):
    L.seed_everything(7, verbose=False)
    module = Net(0.0, lr=0.03, optimizer=torch.optim.AdamW)
    saver = ModelCheckpoint(folder, filename=f"{kind}-{epochs}", enable_version_counter=False)
    run = trainer(
        *(folder, None, strategy(kind, **sizes)),
        **{"precision": "64-true", "max_epochs": epochs, "gradient_clip_val": 0.1},
        **{"callbacks": [saver], "enable_checkpointing": True},
    )
    run.fit(module, loader(32, batch_size=own(8), dtype=torch.float64), ckpt_path=ckpt)
    return module, saver.best_model_path


def _runs(folder, layouts):
    """Of each layout and kind: an epoch, a second one from its checkpoint, in each format; the weights then."""
    found = []
    for n, (sizes, formats) in enumerate(layouts):
        for kind in KINDS:
            seen = {}
            for saved in formats:
                here = Path(folder) / f"{n}-{saved}"
                module, path = _fit(here, kind, 1, state_dict_type=saved, **sizes)
                seen[f"{saved}, one epoch"] = weights(module)
                module, _ = _fit(here, kind, 2, path, state_dict_type=saved, **sizes)
                seen[saved] = weights(module)
                seen[f"{saved}, path"] = path
            found.append(seen)
    return found


def _resumed(paths):
    """The second epoch from checkpoints of one process."""
    return [weights(_fit(Path(path).parent / "resumed", kind, 2, path)[0]) for kind, path in paths]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(1, _runs, tmp_path_factory.mktemp("alone"), [({}, FORMATS)])[0]


def test_the_same_training_on_any_ranks_and_from_any_checkpoint(alone, tmp_path):
    layouts = {2: [({}, FORMATS)], 4: [({}, ["full"]), ({"phantom_parallel_size": 2}, ["sharded"])]}
    for expected in alone:
        for name, value in expected["full"].items():
            assert torch.equal(value, expected["sharded"][name])
            assert value.shape[0] == 0 or not torch.equal(value, expected["full, one epoch"][name]), name
    for size, those in layouts.items():
        asked = [(expected, formats) for _, formats in those for expected in alone]
        for found in run_ranks(size, _runs, tmp_path / str(size), those):
            for seen, (expected, formats) in zip(found, asked, strict=True):
                for saved, (name, value) in itertools.product(formats, expected["full"].items()):
                    assert torch.allclose(seen[saved][name], value, rtol=0, atol=1e-9), (size, saved, name)
    paths = [(kind, seen[f"{s}, path"]) for kind, seen in zip(KINDS, alone, strict=True) for s in FORMATS]
    for found in run_ranks(2, _resumed, paths):
        for (kind, path), seen in zip(paths, found, strict=True):
            for name, value in alone[list(KINDS).index(kind)]["full"].items():
                assert torch.allclose(seen[name], value, rtol=0, atol=1e-9), (path, name)


def test_a_full_checkpoint_is_dense_only_where_that_is_the_same_function(alone):
    private, both, *_ = (torch.load(seen["full, path"], weights_only=True) for seen in alone)
    x = torch.randn(5, 16, dtype=torch.float64)
    plain, module = Net(0.0).double(), Net(0.0).double()
    plain.load_state_dict(private["state_dict"])
    phantomize_(module, PhantomConfig(4, 0.5, init="random", mixing="private"))
    module.load_state_dict(private["state_dict"] | private["phantom"]["factors"][0]["tensors"])
    assert torch.allclose(plain(x), module(x), atol=1e-12)
    assert torch.allclose(densify(module)(x), module(x), atol=1e-12)
    with pytest.raises(RuntimeError, match=r"(?s)net.3.decompressor_before_weight.*size mismatch for net.3.weight"):
        Net(0.0).load_state_dict(both["state_dict"])
    assert both["state_dict"]["net.0.weight"].shape == (32, 16)  # the first reads its own latents alone
    records = both["phantom"]["layers"]
    assert "latents" not in records["net.0"]
    assert (records["net.6"]["latents"], records["net.6"]["predecessor"]) == ("both", "net.3")


@pytest.mark.parametrize(
    ("saved", "here", "said"),
    [
        ("private", {}, "'net.0' has mixing=private in the checkpoint and mixing=pairwise in the model"),
        (
            "both",
            {},
            "'net.3' has latents=both in the checkpoint and latents=own in the model; resume with the latents",
        ),
        ("both", {"latents": "previous"}, "latents=both in the checkpoint and latents=previous in the model"),
    ],
)
def test_another_kind_is_refused(alone, tmp_path, saved, here, said):
    path = alone[list(KINDS).index(saved)]["full, path"]
    other = PhantomStrategy(2 if saved == "private" else 0.5, 4, **here)
    if saved == "private":  # of the same width
        other = PhantomStrategy(0.25, 4, **here)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        trainer(tmp_path, 1, other).validate(Net(), loader(), ckpt_path=path, verbose=False)


def chain(*widths):
    return nn.Sequential(*(m for sizes in itertools.pairwise(widths) for m in (nn.Linear(*sizes), nn.GELU())))


def test_what_the_plan_says():
    def reasons(module, **kwargs):
        return [
            (layer.latents, layer.predecessor) for layer in plan_phantom(module, PhantomConfig(2, **kwargs)).swapped
        ]

    deep = chain(16, 16, 16, 16)
    assert reasons(deep, latents="both") == [("own", ""), ("both", "0"), ("both", "2")]
    assert reasons(deep, latents="previous") == [("own", ""), ("previous", "0"), ("previous", "2")]
    assert reasons(deep) == [("own", "")] * 3
    assert reasons(chain(16, 32, 16), latents="both") == [("own", "")] * 2  # a pair, as in a transformer
    deep[3] = nn.LayerNorm(16)
    assert reasons(deep, latents="both") == [("own", ""), ("both", "0"), ("own", "")]
    shown = str(plan_phantom(chain(32, 32, 32, 32), PhantomConfig(2, 0.5, latents="both", mixing="private")))
    assert "num_blocks=2, mixing=private, latents=both" in shown
    assert "reads its own latents and those of" in shown and shown.count("│ 4 │") == 3  # k: half of pairwise's 8

    class Tied(nn.Module):  # the second of its linears is called twice
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.c(self.b(self.b(torch.relu(self.a(x)))))

    assert reasons(Tied(), latents="both", plan={"*": "phantom"}) == [("own", "")] * 3


def test_layers_that_read_others_are_not_densified():
    module = phantomize_(chain(16, 16, 16, 16), PhantomConfig(2, latents="both"))
    with pytest.raises(PhantomError, match=r"'2' reads latents of '0' \(latents='both'\)"):
        densify(module)
    assert isinstance(module[2], PhantomLinear)


def test_a_chain_starts_from_dense_weights_and_learns_to_read_the_layer_before():
    torch.manual_seed(0)
    dense = chain(16, 16, 16, 16).double()
    x = torch.randn(64, 16, dtype=torch.float64)
    expected = dense(x)
    module = phantomize_(dense, PhantomConfig(2, 8, {"*": "phantom"}, latents="both"))
    assert torch.allclose(module(x), expected, atol=1e-12)  # k is the largest: the dense weights are held exactly
    assert not module[2].decompressor_before_weight.any()
    module(x).square().mean().backward()
    assert module[2].decompressor_before_weight.grad.abs().max() > 1e-6
    exact = phantomize_(chain(16, 32, 16).double(), PhantomConfig(2, 8, {"*": "phantom"}, mixing="private"))
    torch.manual_seed(1)
    again = chain(16, 32, 16).double()
    for n in (0, 2):
        exact[n].load_dense(again[n].weight, again[n].bias)
    assert torch.allclose(exact(x), again(x), atol=1e-12)


def test_copies_have_chains_of_their_own():
    import copy
    import io

    module = phantomize_(chain(16, 16, 16, 16).double(), PhantomConfig(2, latents="both"))
    x = torch.randn(4, 16, dtype=torch.float64)
    out = module(x)  # leaves nothing that cannot be copied
    module[0](x)  # nor does a letter that nobody has read
    twin = copy.deepcopy(module)
    assert twin[2].predecessor == (twin[0],) and twin[0].followers == (twin[2],)
    assert torch.equal(twin(x), out)
    h = module[:2](x)
    twin(2 * x)  # between two layers of the other
    assert torch.equal(module[2:](h), out)
    with torch.no_grad():
        twin[0].compressor_weight.zero_()
    assert torch.equal(module(x), out) and not torch.equal(twin(x), out)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), out) and loaded[4].predecessor == (loaded[2],)
    assert len(list(module.named_parameters())) == len(split_layers(module)) * 4 + 2  # links are no modules


def test_followers_come_in_the_order_of_the_module():
    """On every rank alike: their latents travel side by side in that order."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.heads = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))

        def forward(self, x):
            x = torch.relu(self.second(torch.relu(self.first(x))))
            return [self.heads[n](x) for n in range(12)]

    module = phantomize_(Heads(), PhantomConfig(4, init="random", latents="previous"))
    assert [layer.name for layer in module.second.followers] == [f"heads.{n}" for n in range(12)]


def test_bad_layers_are_refused():
    first = PhantomLinear(16, 16, 4, 2)
    for arguments, said in (
        ({"latents": "both"}, "latents='both': needs a predecessor"),
        ({"predecessor": first}, "this layer reads its own"),
        ({"mixing": "privat"}, "mixing='privat': choose one of 'pairwise', 'private'"),
        ({"latents": "all"}, "latents='all': choose one of 'own', 'both', 'previous'"),
        ({"latents": "both", "mixing": "private", "predecessor": first}, "they must be the same"),
    ):
        with pytest.raises(PhantomError, match=said):
            PhantomLinear(16, 16, 4, 2, **arguments)
    with pytest.raises(PhantomError, match="mixing='none'"):
        PhantomConfig(4, mixing="none")
    stale = PhantomLinear(16, 16, 4, 2, latents="previous", predecessor=first)
    with pytest.raises(PhantomError, match="makes latents of its own input"):
        PhantomLinear(16, 16, 4, 2, latents="both", predecessor=stale)
