"""Checkpoints from dense to phantom and back: the calibration's least squares, exact merges, the command."""

import copy
import ctypes
import io
import itertools
import json
import os
import re
import shlex
import signal
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from converting import CONFIG, Small, SmallData
from torch import nn
from training import trainer

from lightning_phantom import PhantomConfig, PhantomStrategy, phantomize_, plan_phantom
from lightning_phantom.checkpoints.format import factors_of
from lightning_phantom.commands.cli import main
from lightning_phantom.conversion import calibrate, files, from_phantom, to_phantom
from lightning_phantom.conversion.calibrate import Moments, calibrated, improve_columns, record_inputs, refit
from lightning_phantom.distributed.ranks import Ranks
from lightning_phantom.layers.factors import Blocks, Factors, from_dense, merge, random_factors, to_dense
from lightning_phantom.layers.split import split_layers

ALONE = Ranks(None)


# The mathematics


def layer_and_inputs(n_in=24, n_out=16, tokens=200):
    mix = torch.randn(n_in, n_in, dtype=torch.float64) * torch.logspace(0, -2, n_in, dtype=torch.float64)
    x = torch.randn(tokens, n_in, dtype=torch.float64) @ mix + torch.randn(n_in, dtype=torch.float64)
    return torch.randn(n_out, n_in, dtype=torch.float64), torch.randn(n_out, dtype=torch.float64), x


def moments_of(x, splits=3):
    moments = Moments(x.shape[1])
    for part in x.chunk(splits):
        moments.add(part)
    return moments


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_refit_is_least_squares_on_the_data(has_bias):
    """Against torch's lstsq on the rows themselves, with an intercept if there is a bias, the ridge as more rows."""
    weight, _, x = layer_and_inputs()
    blocks = Blocks(24, 16, 4, 2, 0, "")
    start = from_dense(weight, blocks, ALONE)
    metric = moments_of(x).metric(centred=has_bias)
    fitted = refit(weight, start, metric, blocks)

    rows = (x - x.mean(0) if has_bias else x) / len(x) ** 0.5
    ridge = calibrate.RIDGE * rows.square().sum(0).mean() + calibrate.ROUNDING * x.square().mean()
    rows = torch.cat([rows, ridge.sqrt() * torch.eye(24, dtype=torch.float64)])
    xs, compressors = rows.chunk(4, dim=1), start.compressor.chunk(4)
    for i in range(4):
        features = torch.cat([xs[i], *(xs[j] @ compressors[j].T for j in range(4) if j != i)], dim=1)
        expected = torch.linalg.lstsq(features, rows @ weight[4 * i : 4 * i + 4].T).solution.T
        got = torch.cat([fitted.weight[4 * i : 4 * i + 4], fitted.decompressor[4 * i : 4 * i + 4]], dim=1)
        assert torch.allclose(got, expected, atol=1e-9)
    assert torch.equal(fitted.compressor, start.compressor)


def test_a_column_is_the_best_of_its_width_given_the_others():
    """Against gradient descent on that column's C and D from where the closed form is: there is nothing to gain."""
    weight, _, x = layer_and_inputs()
    blocks = Blocks(24, 16, 4, 2, 0, "")
    metric = moments_of(x).metric(centred=False)
    factors = refit(weight, from_dense(weight, blocks, ALONE), metric, blocks)

    def loss(f):
        error = weight - to_dense(f, 4)
        return (error @ metric * error).sum()

    better = improve_columns(weight, factors, metric, blocks)
    assert loss(better) < loss(factors)
    # The last column was improved last, so it is at its optimum: its gradient vanishes there, others' need not.
    leaves = Factors(*(f.clone().requires_grad_() for f in better[:3]))
    loss(leaves).backward()
    assert leaves.compressor.grad[-2:].abs().max() < 1e-8 * leaves.compressor.grad.abs().max()
    assert leaves.decompressor.grad[:-4, -2:].abs().max() < 1e-8 * leaves.weight.grad.abs().max()
    # And no restart finds a better one.
    for seed in range(3):
        torch.manual_seed(seed)
        other = Factors(better.weight, better.compressor.clone(), better.decompressor.clone())
        other.compressor[-2:] = torch.randn(2, 6)
        other.decompressor[:-4, -2:] = 0
        leaf = Factors(*(f.clone().requires_grad_() for f in other[:3]))
        free = torch.optim.LBFGS([leaf.compressor, leaf.decompressor], max_iter=200, line_search_fn="strong_wolfe")

        def step(leaf=leaf, free=free):
            free.zero_grad()
            value = loss(leaf)
            value.backward()
            leaf.compressor.grad[:-2] = 0
            leaf.decompressor.grad[-4:] = 0
            leaf.decompressor.grad[:, :-2] = 0
            return value

        free.step(step)
        assert loss(leaf) >= loss(better) * (1 - 1e-6)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_calibration_is_never_worse_on_its_own_data_and_better_on_more_of_the_kind(p, has_bias):
    weight, bias, x = layer_and_inputs(tokens=400)
    bias = bias if has_bias else None
    fit, unseen = moments_of(x[:300]), moments_of(x[300:])
    for k in (1, 2):
        blocks = Blocks(24, 16, p, k, 0, "")
        plain = from_dense(weight, blocks, ALONE)
        factors, new_bias = calibrated(weight, bias, plain, blocks, fit)
        for seen, margin in ((fit, 1.0), (unseen, 0.9)):
            errors = [
                seen.output_error((weight, bias), new)
                for new in ((to_dense(plain, p), bias), (to_dense(factors, p), new_bias))
            ]
            assert errors[1] < margin * errors[0], (p, k, errors)


def test_output_error_is_that_of_the_outputs():
    weight, bias, x = layer_and_inputs()
    other, other_bias = weight + 0.1 * torch.randn_like(weight), bias + 0.1
    wrong = x @ (other - weight).T + 0.1
    expected = wrong.norm() / (x @ weight.T + bias).norm()
    assert abs(moments_of(x).output_error((weight, bias), (other, other_bias)) - expected) < 1e-12


def test_calibration_is_exact_at_the_largest_width_and_survives_unused_features():
    weight, bias, x = layer_and_inputs()
    x[:, :3] = 0  # a dead feature has no variance
    blocks = Blocks(24, 16, 4, 6, 0, "")
    for seen in (x, x[:1], 0 * x):  # one input alone determines nothing either
        factors, new_bias = calibrated(weight, bias, from_dense(weight, blocks, ALONE), blocks, moments_of(seen, 1))
        assert torch.allclose(to_dense(factors, 4), weight, atol=1e-9)
        assert torch.allclose(new_bias, bias, atol=1e-9)


def test_calibrated_components_that_carry_nothing_can_learn():
    weight = torch.block_diag(*torch.randn(4, 4, 6, dtype=torch.float64))
    blocks = Blocks(24, 16, 4, 2, 0, "")
    factors, _ = calibrated(weight, None, from_dense(weight, blocks, ALONE), blocks, moments_of(layer_and_inputs()[2]))
    assert (factors.compressor.norm(dim=1) > 0.1).all()
    assert torch.allclose(to_dense(factors, 4), weight, atol=1e-9)


@pytest.mark.parametrize(
    ("n_in", "n_out", "p", "q", "k"),
    [(48, 24, 8, 2, 2), (48, 24, 8, 4, 2), (24, 48, 12, 3, 1), (32, 32, 4, 2, 8), (64, 8, 4, 2, 6)],
)
def test_merging_is_exact(n_in, n_out, p, q, k):
    """The last size merges to more latents than any matrix of the size has use for."""
    factors = random_factors(Blocks(n_in, n_out, p, k, 0, ""), ALONE, torch.float64)
    merged = merge(factors, p, q)
    width = merged.compressor.shape[0] // (p // q)
    coarse = p // q
    assert width == min(q * k, n_in // coarse, (coarse - 1) * n_out // coarse)
    assert merged.weight.shape == (n_out, n_in // coarse)
    assert merged.decompressor.shape == (n_out, (coarse - 1) * width)
    assert torch.allclose(to_dense(merged, coarse), to_dense(factors, p), atol=1e-12, rtol=0)


def gated():
    return nn.Sequential(nn.Linear(16, 64), nn.GLU(), nn.Linear(32, 16))


def test_a_gate_in_one_linear_is_cut_as_a_strategy_cuts_it_and_merges_exactly(tmp_path):
    torch.manual_seed(0)
    module, x = gated(), torch.randn(5, 16)
    checkpoint = {"state_dict": module.state_dict()}
    plan = plan_phantom(module, PhantomConfig(8, 1))
    converted, _ = to_phantom.to_phantom(checkpoint, plan, tmp_path)
    phantom = phantomize_(copy.deepcopy(module), PhantomConfig(8, 1))
    assert converted["phantom"]["layers"]["0"]["parts"] == phantom[0].parts == 2
    (factors,) = factors_of(converted)
    assert all(torch.equal(factors.tensors[name], value) for name, value in phantom.state_dict().items())
    module.load_state_dict(converted["state_dict"])
    assert torch.allclose(module(x), phantom(x), atol=1e-6)

    merged, _ = from_phantom.to_fewer_blocks(converted, 2, tmp_path)
    coarse = phantomize_(gated(), PhantomConfig(4, 2))
    (factors,) = factors_of(merged)
    coarse.load_state_dict(factors.tensors)
    assert torch.allclose(coarse(x), phantom(x), atol=1e-6)
    module.load_state_dict(merged["state_dict"])
    assert torch.allclose(module(x), phantom(x), atol=1e-6)


def test_calibration_of_private_blocks_is_least_squares():
    """The gradient of the outputs' error vanishes at L and D, and no turn makes it worse; at full width it is exact."""
    weight, bias, x = layer_and_inputs()
    for k in (1, 2, 4):
        blocks = Blocks(24, 16, 4, k, 0, "", "private")
        start, moments = from_dense(weight, blocks, ALONE), moments_of(x)
        metric = moments.metric(centred=True)

        def loss(factors, metric=metric):
            error = weight - to_dense(factors, 4, "private")
            return ((error @ metric) * error).sum()

        fitted = refit(weight, start, metric, blocks)
        leaves = Factors(*(f.clone().requires_grad_() for f in fitted[:3]))
        loss(leaves).backward()
        scale = (weight @ metric).norm()
        assert max(leaves.weight.grad.norm(), leaves.decompressor.grad.norm()) < 1e-8 * scale
        better = improve_columns(weight, fitted, metric, blocks)
        factors, _ = calibrated(weight, bias, start, blocks, moments)
        losses = [loss(each).item() for each in (start, fitted, better, factors)]
        rounding = 1e-12 * ((weight @ metric) * weight).sum().item()
        assert all(after <= before + rounding for before, after in itertools.pairwise(losses)), losses
        if k == 4:
            assert torch.allclose(to_dense(factors, 4, "private"), weight, atol=1e-9)


@pytest.mark.parametrize(("n_in", "n_out", "p", "q", "k"), [(48, 24, 8, 2, 1), (24, 48, 12, 3, 1), (64, 64, 4, 2, 2)])
def test_merging_private_blocks_is_exact(n_in, n_out, p, q, k):
    factors = random_factors(Blocks(n_in, n_out, p, k, 0, "", "private"), ALONE, torch.float64)
    merged, coarse = merge(factors, p, q, "private"), p // q
    width = min(q * q * k, n_in // coarse, n_out // coarse)
    assert merged.compressor.shape == (coarse * (coarse - 1) * width, n_in // coarse)
    assert torch.allclose(to_dense(merged, coarse, "private"), to_dense(factors, p, "private"), atol=1e-12, rtol=0)


def test_torchs_fused_transformer_layers_are_seen_too():
    """In eval mode, with a padding mask, they would not call their linears."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad(), record_inputs(encoder, ["layers.0.linear1", "layers.1.linear2"]) as moments:
        encoder(x, src_key_padding_mask=padding)
    assert [seen.count for seen in moments.values()] == [15, 15]
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks for module in encoder.modules())


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a trained dense checkpoint and a config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    t = trainer(tmp_path, strategy="auto", max_epochs=3)
    t.fit(Small(), datamodule=SmallData())
    t.save_checkpoint("dense.ckpt")
    return tmp_path


def convert(*arguments):
    main(["convert", *map(str, arguments)])


def refused(*arguments):
    with redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        convert(*arguments)
    return said.getvalue()


def validation_loss(path, strategy):
    t = trainer(".", strategy=strategy)
    (result,) = t.validate(Small(), datamodule=SmallData(), ckpt_path=path, verbose=False)
    return result["val_loss"]


def strategy(num_blocks=4, phantom_width=0.5):
    return PhantomStrategy(num_blocks=num_blocks, phantom_width=phantom_width)


def test_convert_calibrate_validate_train_merge_and_leave(folder, capsys):
    convert("dense.ckpt", "plain.ckpt", "--config", "run.yaml", "--report", "plain.json")
    convert("dense.ckpt", "good.ckpt", "--config", "run.yaml", "--calibrate", 6, "--report", "good.json")
    out = capsys.readouterr().out
    assert "net.0" in out and "PhantomStrategy(num_blocks=4, phantom_width=0.5)" in out
    plain, good = (json.loads((folder / f"{name}.json").read_text()) for name in ("plain", "good"))
    assert [layer["name"] for layer in good["layers"]] == ["net.0", "net.2", "net.4"]
    for before, after in zip(plain["layers"], good["layers"], strict=True):
        assert after["output_error"] < after["plain_output_error"] < 1
        assert before["output_error"] is None and before["weight_error"] <= after["weight_error"]
        assert after["phantom_width"] == 2 if after["name"] != "net.2" else 4
    assert good["weights_after"] == sum(layer["weights_after"] for layer in good["layers"]) < good["weights_before"]

    # The report's errors are those of the layers in the file.
    dense, saved = (torch.load(name, weights_only=True) for name in ("dense.ckpt", "good.ckpt"))
    theirs, ours = (c["state_dict"]["net.2.weight"] for c in (dense, saved))
    assert abs(good["layers"][1]["weight_error"] - ((ours - theirs).norm() / theirs.norm()).item()) < 1e-5
    assert torch.equal(saved["state_dict"]["head.weight"], dense["state_dict"]["head.weight"])
    assert saved["vocabulary"] == ["a", "b"] and saved["hyper_parameters"] == dense["hyper_parameters"]

    # Validation and load_from_checkpoint take it, and are the same function.
    loss = validation_loss("good.ckpt", strategy())
    assert abs(loss - validation_loss("good.ckpt", "auto")) < 1e-5
    assert validation_loss("dense.ckpt", "auto") < loss < validation_loss("plain.ckpt", strategy())
    assert torch.equal(Small.load_from_checkpoint("good.ckpt").net[2].weight, ours)

    # A fit starts from its factors, anew.
    fit = trainer(folder, strategy=strategy(), limit_train_batches=0)
    module = Small()
    fit.fit(module, datamodule=SmallData(), ckpt_path="good.ckpt")
    factors = saved["phantom"]["factors"][0]["tensors"]
    for name, layer in split_layers(module).items():
        for key, parameter in layer.named_parameters():
            assert torch.equal(parameter, factors[f"{name}.{key}"])
    fit = trainer(folder, strategy=strategy(), max_epochs=2)
    fit.fit(Small(), datamodule=SmallData(), ckpt_path="good.ckpt")
    assert (fit.current_epoch, fit.global_step) == (2, 12)
    fit.save_checkpoint("tuned.ckpt")
    assert "converted" not in torch.load("tuned.ckpt", weights_only=True)["phantom"]

    # Two blocks of twice the width are the same function; and so is the dense model at the end.
    convert("tuned.ckpt", "merged.ckpt", "--merge", 2, "--report", "merged.json")
    plan = dict.fromkeys(("net.0", "net.2", "net.4"), "phantom")
    assert f"PhantomStrategy(num_blocks=2, phantom_width=0.5, plan={plan})" in capsys.readouterr().out
    tuned = validation_loss("tuned.ckpt", strategy())
    merged = PhantomStrategy(num_blocks=2, phantom_width=0.5, plan=plan)
    assert abs(validation_loss("merged.ckpt", merged) - tuned) < 1e-5
    assert max(layer["weight_error"] for layer in json.loads((folder / "merged.json").read_text())["layers"]) < 1e-6
    convert("merged.ckpt", "left.ckpt", "--to", "dense")
    left = torch.load("left.ckpt", weights_only=True)
    assert "phantom" not in left
    assert abs(validation_loss("left.ckpt", "auto") - tuned) < 1e-5
    trainer(folder, strategy="auto").fit(Small(), datamodule=SmallData(), ckpt_path="left.ckpt")


def test_private_layers_and_chains_are_converted(folder, capsys):
    def settings(more):
        (folder / "run.yaml").write_text(CONFIG.replace("num_blocks: 4", f"num_blocks: 4, {more}"))

    settings("mixing: private")
    convert("dense.ckpt", "private.ckpt", "--config", "run.yaml", "--phantom-width", 1)

    def private():
        return PhantomStrategy(num_blocks=4, phantom_width=1, mixing="private")

    assert "phantom_width=1, mixing='private')" in capsys.readouterr().out
    loss = validation_loss("private.ckpt", private())
    assert abs(loss - validation_loss("private.ckpt", "auto")) < 1e-5
    convert("private.ckpt", "merged.ckpt", "--merge", 2)
    plan = dict.fromkeys(("net.0", "net.2", "net.4"), "phantom")
    merged = PhantomStrategy(num_blocks=2, phantom_width=4, plan=plan, mixing="private")
    assert f"phantom_width=4, plan={plan}, mixing='private')" in capsys.readouterr().out
    assert abs(validation_loss("merged.ckpt", merged) - loss) < 1e-5
    convert("merged.ckpt", "left.ckpt", "--to", "dense")
    assert abs(validation_loss("left.ckpt", "auto") - loss) < 1e-5
    convert("dense.ckpt", "good.ckpt", "--config", "run.yaml", "--phantom-width", 1, "--calibrate", 6)
    dense = validation_loss("dense.ckpt", "auto")
    assert abs(validation_loss("good.ckpt", private()) - dense) < abs(loss - dense)

    settings("latents: both")
    convert("dense.ckpt", "both.ckpt", "--config", "run.yaml")
    both = PhantomStrategy(num_blocks=4, phantom_width=0.5, latents="both")
    assert "phantom_width=0.5, latents='both')" in capsys.readouterr().out
    settings("latents: own")
    convert("dense.ckpt", "own.ckpt", "--config", "run.yaml")
    loss = validation_loss("both.ckpt", both)  # nothing is read of the layer before yet
    assert abs(loss - validation_loss("own.ckpt", strategy())) < 1e-5
    fit = trainer(folder, strategy=PhantomStrategy(num_blocks=4, phantom_width=0.5, latents="both"), max_epochs=3)
    fit.fit(Small(), datamodule=SmallData(), ckpt_path="both.ckpt")
    fit.save_checkpoint("tuned.ckpt")
    assert torch.load("tuned.ckpt")["state_dict"]["net.2.decompressor_before_weight"].any()
    assert validation_loss("tuned.ckpt", PhantomStrategy(0.5, 4, latents="both")) < loss
    for arguments in (("--to", "dense"), ("--merge", 2)):
        said = refused("tuned.ckpt", "x.ckpt", *arguments)
        assert "'net.2' reads latents of 'net.0' (latents='both'): no dense weight stands for it" in said
    settings("latents: previous")
    said = refused("dense.ckpt", "x.ckpt", "--config", "run.yaml")
    assert "latents='previous'" in said and "init='random'" in said


def test_a_bare_state_dict_makes_a_checkpoint_and_the_full_width_loses_nothing(folder):
    dense = torch.load("dense.ckpt", weights_only=True)["state_dict"]
    torch.save(dense, "state.pt")
    options = ["--num-blocks", 4, "--phantom-width", 8, "--plan", "{net.*: phantom}"]
    convert("state.pt", "phantom.ckpt", "--config", "run.yaml", *options)
    convert("phantom.ckpt", "back.ckpt", "--to", "dense")
    back = torch.load("back.ckpt", weights_only=True)["state_dict"]
    assert list(back) == list(dense)
    for key, value in dense.items():
        assert torch.allclose(back[key], value, atol=1e-5), key
    assert Small.load_from_checkpoint("phantom.ckpt").hparams.width == 32


def test_a_module_that_brings_its_own_data_is_calibrated_with_them(folder):
    converted = {}
    for name, config in (
        ("data", CONFIG),
        ("own", CONFIG.split("data:")[0].replace("converting.Small", "converting.SelfFed")),
    ):
        Path(f"{name}.yaml").write_text(config)
        torch.manual_seed(0)  # the batches are shuffled
        convert("dense.ckpt", f"{name}.ckpt", "--config", f"{name}.yaml", "--calibrate", 2)
        converted[name] = torch.load(f"{name}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, converted["own"][key]) for key, tensor in converted["data"].items())


def test_calibration_in_several_passes_is_the_same(folder, monkeypatch):
    convert("dense.ckpt", "one.ckpt", "--config", "run.yaml", "--calibrate", 2)
    monkeypatch.setattr(to_phantom, "STATISTICS_BYTES", 1)
    monkeypatch.setattr("torch.randperm", lambda n, **_: torch.arange(n))  # the order of batches, if drawn again
    convert("dense.ckpt", "three.ckpt", "--config", "run.yaml", "--calibrate", 6)
    monkeypatch.setattr(to_phantom, "STATISTICS_BYTES", 2**30)
    convert("dense.ckpt", "again.ckpt", "--config", "run.yaml", "--calibrate", 6)
    three, again = (torch.load(f"{n}.ckpt", weights_only=True)["state_dict"] for n in ("three", "again"))
    assert all(torch.equal(three[key], again[key]) for key in three)


def test_bad_requests_are_refused_before_anything_is_written(folder):
    (folder / "broken.ckpt").write_bytes((folder / "dense.ckpt").read_bytes()[:-500])
    (folder / "there.ckpt").write_text("mine")
    convert("dense.ckpt", "phantom.ckpt", "--config", "run.yaml")
    other = torch.load("dense.ckpt", weights_only=True)
    other["state_dict"]["net.2.weight"] = torch.zeros(8, 8)
    torch.save(other, "other.ckpt")
    other["state_dict"]["net.2.weight"] = torch.full((32, 32), float("nan"))
    torch.save(other, "nan.ckpt")
    torch.save({k: v for k, v in other["state_dict"].items() if k != "net.2.weight"}, "short.ckpt")
    torch.save({**other, "mine": Small}, "pickled.ckpt")
    (folder / "dense.yaml").write_text(CONFIG.split("  strategy")[0] + CONFIG[CONFIG.index("model:") :])
    (folder / "nodata.yaml").write_text(CONFIG.split("data:")[0])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for arguments, message in (
        (("none.ckpt", "x.ckpt", "--config", "run.yaml"), "there is no such file"),
        ((".", "x.ckpt", "--config", "run.yaml"), "a directory"),
        (("broken.ckpt", "x.ckpt", "--config", "run.yaml"), "truncated"),
        (("run.yaml", "x.ckpt", "--config", "run.yaml"), "no checkpoint"),
        (("pickled.ckpt", "x.ckpt", "--config", "run.yaml"), "--trust"),
        (("nan.ckpt", "x.ckpt", "--config", "run.yaml"), "'net.2' holds NaN"),
        (("other.ckpt", "x.ckpt", "--config", "run.yaml"), "net.2.weight [8, 8], not [32, 32]"),
        (("short.ckpt", "x.ckpt", "--config", "run.yaml"), "missing from the checkpoint: net.2.weight"),
        (("dense.ckpt", "x.ckpt"), "--config is needed"),
        (("dense.ckpt", "x.ckpt", "--config", "no.yaml"), "there is no such file"),
        (("dense.ckpt", "x.ckpt", "--config", "dense.yaml"), "--num-blocks is needed"),
        (("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--num-blocks", 1), "num_blocks=1"),
        (("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--num-blocks", 7), "nothing in Small qualifies"),
        (("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--plan", "{n.*: phantom}"), "matches no module"),
        (("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--calibrate", 0), "at least one batch"),
        (("dense.ckpt", "x.ckpt", "--config", "nodata.yaml", "--calibrate", 2), "Small has no train_dataloader"),
        (("dense.ckpt", "there.ckpt", "--config", "run.yaml"), "--force"),
        (("dense.ckpt", "no/x.ckpt", "--config", "run.yaml"), "OUTPUT no/x.ckpt: there is no such folder"),
        (("phantom.ckpt", "x.ckpt", "--config", "run.yaml"), "phantom layers of 4 blocks already"),
        (("phantom.ckpt", "x.ckpt", "--merge", 3), "Possible: 2"),
        (("phantom.ckpt", "x.ckpt", "--merge", 4), "use --to dense"),
        (("dense.ckpt", "x.ckpt", "--merge", 2), "the checkpoint is dense"),
        (("dense.ckpt", "x.ckpt", "--to", "dense"), "the checkpoint is dense"),
        (("phantom.ckpt", "x.ckpt", "--to", "dense", "--calibrate", 2), "--calibrate: only for"),
    ):
        assert message in refused(*arguments), arguments
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    convert("dense.ckpt", "there.ckpt", "--config", "run.yaml", "--force")
    assert torch.load("there.ckpt", weights_only=True)["phantom"]["num_blocks"] == 4


def test_a_conversion_that_fails_on_its_way_leaves_nothing(folder, monkeypatch):
    before = sorted(os.listdir())
    names = []

    def fails(weight, *_):
        names.append(weight.shape)
        if len(names) == 2:
            raise RuntimeError("no more memory")
        return from_dense(weight, *_)

    monkeypatch.setattr(to_phantom, "from_dense", fails)
    with pytest.raises(RuntimeError, match="no more memory"):
        convert("dense.ckpt", "x.ckpt", "--config", "run.yaml")
    assert sorted(os.listdir()) == before


def test_a_conversion_that_is_killed_while_it_writes_leaves_the_old_file(folder, monkeypatch):
    convert("dense.ckpt", "x.ckpt", "--config", "run.yaml")
    old = (folder / "x.ckpt").read_bytes()
    save = torch.save

    def half(checkpoint, file):
        save(checkpoint, file)
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(torch, "save", half)
        try:
            convert("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--phantom-width", 1, "--force")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (folder / "x.ckpt").read_bytes() == old
    convert("dense.ckpt", "x.ckpt", "--config", "run.yaml", "--phantom-width", 1, "--force")
    assert [name for name in os.listdir() if name.startswith(".")] == []


def test_memory_stays_near_one_layer(folder, monkeypatch):
    """What a conversion allocates while it runs does not grow with the number of layers it has done."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))
    torch.save({f"net.{n}.{key}": value for n, m in enumerate(model) for key, value in m.state_dict().items()}, "s.pt")
    del model
    state = files.read(folder / "s.pt", trust=False)
    from lightning_phantom import PhantomConfig, plan_phantom

    with torch.device("meta"):
        module = nn.ModuleDict({"net": nn.Sequential(*(nn.Linear(512, 512) for _ in range(12)))})
    plan = plan_phantom(module, PhantomConfig(4, 64, plan={"net.*": "phantom"}))
    held = []
    # Else glibc keeps freed memory of this size in a heap that small objects break up.
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD

    def allocated(name):
        with open("/proc/self/status") as status:
            held.append(next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")))

    to_phantom.to_phantom(state, plan, folder, on_layer=allocated)
    assert len(held) == 12
    layer = 512 * 512 * 4
    assert held[-1] - held[2] < 3 * layer  # and not the nine layers' weights and factors, 1.6 of a layer each


def test_help(capsys):
    for arguments, expected in (["--help"], "convert: dense checkpoint"), (["convert", "--help"], "--calibrate N"):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert expected in " ".join(capsys.readouterr().out.split())


def test_the_how_to_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    blocks = re.findall(r"```(yaml|python|bash)\n(.*?)```", page, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["yaml", "python", "bash", "bash", "yaml", "bash"]
    names = iter(["run.yaml", "merged.yaml"])
    for language, block in blocks:
        if language == "yaml":
            (tmp_path / next(names)).write_text(block)
        elif language == "python":
            exec(compile(block, "pretrained.md", "exec"), {})
        else:
            for line in block.splitlines():
                main(shlex.split(line)[1:])
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert all(layer["output_error"] < layer["plain_output_error"] for layer in layers)
