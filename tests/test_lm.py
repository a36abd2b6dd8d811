"""The language model example: its text, its model, and the files that run it."""

from pathlib import Path

import pytest
import torch
import yaml

from examples.lm import LanguageModel, Text
from lightning_phantom import PhantomConfig, plan_phantom

ROOT = Path(__file__).parent.parent


def tiny(**kwargs):
    torch.manual_seed(0)
    return LanguageModel(**{**dict(dim=16, depth=2, heads=2, context=8, dropout=0.0), **kwargs})


def test_the_text_is_cut_into_windows_and_its_end_held_out(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(101)))
    data = Text(str(tmp_path / "text"), context=10, batch_size=4, held_out=0.4)
    data.setup("fit")
    tokens, following = data.train.tensors
    assert tokens.tolist() == [list(range(i, i + 10)) for i in range(0, 60, 10)][: len(tokens)]
    assert torch.equal(following, tokens + 1)
    held_out, _ = data.validation.tensors
    assert held_out.min() > following.max() and held_out.max() < 101
    assert [len(x) for x, _ in data.train_dataloader()] == [4]


def test_the_standard_library_is_the_same_text_every_time():
    first, second = Text(max_bytes=100_000), Text(max_bytes=100_000)
    first.setup("fit"), second.setup("fit")
    assert torch.equal(first.train.tensors[0], second.train.tensors[0])
    assert len(first.train) == (95_000 - 1) // 128


def test_a_missing_or_short_text_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text='none.txt': there is no such file in .*"):
        Text("none.txt").setup("fit")
    (tmp_path / "short").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"1000 bytes give 7 windows of context=128 .* a smaller context"):
        Text(str(tmp_path / "short")).setup("fit")


def test_no_position_sees_what_comes_after_it():
    model = tiny().eval()
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] += 1
    changed %= 256
    same = (model(tokens) == model(changed)).all(-1).all(0)
    assert same[:5].all() and not same[5:].any()


def test_the_feed_forward_networks_are_proven_and_nothing_else():
    plan = plan_phantom(tiny(), PhantomConfig(num_blocks=2))
    assert [layer.name for layer in plan.swapped] == [
        f"blocks.{n}.mlp.{name}" for n in (0, 1) for name in ("up", "down")
    ]
    assert not any("traced" in layer.reason for layer in plan.layers)


def test_the_three_runs_differ_in_their_strategy_only():
    overlays = {
        name: yaml.safe_load((ROOT / f"examples/lm_{name}.yaml").read_text())
        for name in ("dense", "phantom", "tensor_parallel")
    }
    assert overlays == {
        "dense": {"trainer": {"devices": 1, "strategy": "auto"}},
        "phantom": {"trainer": {"devices": 2, "strategy": "phantom"}},
        "tensor_parallel": {"trainer": {"devices": 2, "strategy": "tensor_parallel"}},
    }
